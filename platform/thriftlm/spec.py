"""What a run is: model, optimizer, data, system; and what comes out of one.

Nothing here looks at the machine. Identity is the hash of canonical JSON: `recipe_id` leaves the
system out, `trial_id` has it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from thriftlm import corpora
from thriftlm_models.config import ModelSpec, Spec
from thriftlm_models.counts import FLOP_FORMULA

__all__ = [
    "DataSpec",
    "InputError",
    "Measurement",
    "ModelSpec",
    "OptimSpec",
    "Progress",
    "RunSpec",
    "Spec",
    "Status",
    "SystemSpec",
]

ADDED_FIELDS = frozenset(
    {"cpu_offload", "document_mask", "lr_changes", "max_bytes", "momentum", "packing"}
    | {"trunk_tokens"}
)
"""Fields that came after searches had been run: no part of an identity at their default."""
Strategy = Literal["single", "ddp", "fsdp_full", "fsdp_grad_op", "hsdp", "zero1", "zero2", "zero3"]
Status = Literal["running", "done", "stopped", "oom", "diverged"]
Fraction = float


class InputError(Exception):
    """Bad input. The message is all that the user sees: the rule, the value, the way out."""


class OptimSpec(Spec):
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """Update rule. `muon` orthogonalises the updates of the blocks' matrices; adamw trains the
    rest."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    lr_changes: tuple[tuple[PositiveInt, PositiveFloat], ...] = ()
    """Later peaks, `[[tokens, lr], ...]`: the first step after that many tokens is the first at
    that peak. Warm-up and fall are shares of the peak in force."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; gains and other vectors are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moment averages."""
    momentum: Fraction = Field(default=0.95, ge=0, lt=1)
    """Decay rate of Muon's average of gradients."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """Shape of the learning rate over the run; wsd is warm-up, stable, linear decay."""
    warmup_fraction: Fraction = Field(default=0.02, ge=0, lt=1)
    """Share of the run's tokens with linear warm-up."""
    decay_fraction: Fraction = Field(default=0.2, ge=0, le=1)
    """Share of the run's tokens at its end in which wsd decays."""
    final_lr_fraction: Fraction = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    batch_tokens: PositiveInt = 32_768
    """Tokens per optimizer step over all workers."""
    trunk_tokens: PositiveInt | None = None
    """Horizon of the run that this one branches from: `warmup_fraction` counts of it, so that both
    warm up alike. When not given, of this run's own tokens."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                "warmup_fraction + decay_fraction must not exceed 1: "
                f"{self.warmup_fraction} + {self.decay_fraction}"
            )
        if self.trunk_tokens is not None and self.schedule == "cosine":
            raise ValueError(
                "trunk_tokens needs a schedule with a stable part, got cosine; use wsd or constant"
            )
        at = [tokens for tokens, _ in self.lr_changes]
        if at != sorted(set(at)):
            raise ValueError(f"lr_changes must be in order, each at more tokens than before: {at}")
        return self


class DataSpec(Spec):
    """Corpus, tokenizer and how sequences are cut."""

    corpus: str = "python-stdlib"
    """Built-in name; path, folder or glob of text, JSONL (also .gz, .zst) or Parquet, with #field
    where the text is in no `text`; hf://OWNER/NAME?config=C&split=S&column=T&revision=R; or a
    mixture, `{A: 0.7, B: 0.3}` or `0.7 A + 0.3 B`: shares of the sequences."""
    tokenizer: str = "bpe:4096"
    """`bpe:N` trained on the training split, the path of a tokenizer.json, or a hub name."""
    seq_len: PositiveInt = 256
    """Tokens per sequence."""
    validation_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of documents, picked by their hash, held out for the validation loss."""
    max_bytes: PositiveInt | None = None
    """UTF-8 bytes of text that each corpus gives, from its beginning, in whole documents; all of it
    when not given."""
    packing: Literal["stream", "best_fit"] = "stream"
    """`stream` cuts windows through the documents in a row; `best_fit` keeps documents whole where
    they fit (arXiv 2404.10830) and pads."""
    document_mask: bool = False
    """Whether attention stays inside a document."""

    @field_validator("corpus", mode="before")
    @classmethod
    def _corpus(cls, value: Any) -> Any:
        if isinstance(value, dict):
            wrong = [item for item in value.values() if type(item) not in (int, float)]
            if wrong:
                raise ValueError(f"a mixture maps each corpus to its weight, got {wrong[0]!r}")
            value = corpora.mixture(value)
        return corpora.one_spelling(value) if isinstance(value, str) else value

    def anchored(self, folder: Path) -> "DataSpec":
        """The same data with relative paths taken from `folder`: workers have folders of their own.

        Built-in corpora, hf://, `bpe:N` and hub names stay as they are.
        """
        found = {"corpus": corpora.anchored(self.corpus, folder)}
        if self.tokenizer.endswith(".json"):
            found["tokenizer"] = str(folder / self.tokenizer)
        return self.model_copy(update=found)

    @property
    def bpe_vocab(self) -> int | None:
        """N of a `bpe:N` tokenizer, None for any other."""
        kind, _, size = self.tokenizer.partition(":")
        if kind != "bpe":
            return None
        if not size.isdigit() or int(size) < 257:
            raise ValueError(
                f"tokenizer bpe:N needs N of at least 257 (256 bytes and the end of a document), "
                f"got '{self.tokenizer}'"
            )
        return int(size)


class SystemSpec(Spec):
    """Hardware, how the model is spread over it, and where it is rented."""

    gpu: str = "cpu"
    """Canonical id or alias of the catalog; `cpu` is an entry like any other."""
    n_gpus: PositiveInt = 1
    """Workers; for `cpu` each has `cpus_per_worker` threads."""
    gpus_per_node: PositiveInt | None = None
    """GPUs in one node; the catalog's when not given."""
    cpus_per_worker: PositiveInt = 1
    """CPU threads of one worker."""
    strategy: Strategy = "single"
    """How parameters, gradients and optimizer state are spread."""
    micro_batch: PositiveInt = 8
    """Sequences per worker in one forward pass."""
    attention: Literal["math", "flash", "efficient", "cudnn", "flex", "fa2", "fa3", "fa4"] = "flash"
    """Attention kernel, pinned: it runs or it raises."""
    act_ckpt: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing."""
    cpu_offload: bool = False
    """Whether fsdp and zero strategies keep optimizer state in host memory (with masters; under
    fsdp and zero3 weights too)."""
    compile: bool = False
    """Whether blocks go through torch.compile."""
    precision: Literal["fp32", "amp_bf16", "bf16_true"] = "fp32"
    """Arithmetic; amp_bf16 computes in bf16 and keeps fp32 parameters and optimizer state,
    bf16_true keeps everything in bf16."""
    cloud: str = "aws"
    """Whose prices count; `apple_normalised` holds the ratios of arXiv 2410.19456."""
    region: str | None = None
    """Cloud region; the catalog's cheapest when not given."""
    market: Literal["on_demand", "spot"] = "on_demand"
    """On-demand or spot price."""
    billing: Literal["whole_node", "pro_rata"] | None = None
    """Whether a started node is paid whole; default pro_rata for cpu and apple_normalised."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.strategy == "single" and self.n_gpus > 1:
            raise ValueError(
                f"strategy single runs on one GPU, n_gpus is {self.n_gpus}; "
                "choose ddp, fsdp_full, fsdp_grad_op, hsdp, zero1, zero2 or zero3"
            )
        if self.cpu_offload and self.strategy in ("single", "ddp"):
            raise ValueError(
                f"cpu_offload needs a strategy that shards, strategy is {self.strategy}; choose "
                "fsdp_full, fsdp_grad_op, hsdp, zero1, zero2 or zero3 (on one GPU too)"
            )
        node = self.gpus_per_node or self.n_gpus
        if self.strategy == "hsdp" and self.n_gpus > node and self.n_gpus % node:
            raise ValueError(
                f"hsdp shards within nodes, so gpus_per_node must divide n_gpus: {node} does not "
                f"divide {self.n_gpus}"
            )
        return self


class RunSpec(Spec):
    """Everything that determines one training run."""

    model: ModelSpec
    """Architecture."""
    optim: OptimSpec = OptimSpec()
    """Optimizer and schedule."""
    data: DataSpec = DataSpec()
    """Corpus and tokenizer."""
    system: SystemSpec = SystemSpec()
    """Hardware and sharding."""
    seed: NonNegativeInt = 0
    """Seed of initialisation and data order."""
    tokens: PositiveInt
    """Training tokens, the horizon of the learning-rate schedule; rounded up to whole steps."""
    report_every_tokens: PositiveInt
    """Tokens between two reports; a twentieth of the run when not given."""
    checkpoint_every_tokens: PositiveInt | None = None
    """Tokens between two checkpoints; when not given, one at the end."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints are kept; no part of the run's identity."""
    keep_every_tokens: PositiveInt | None = None
    """The first checkpoint at or after each multiple of it is kept too, to branch from; no part of
    the run's identity."""
    validation_tokens: PositiveInt = 65_536
    """Tokens of the validation split read at each report, always the same ones."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last optimizer step, counted from 1, of which the first rank writes a chrome trace
    into the output folder; no part of the run's identity."""
    origin: str | None = None
    """Search and trial that proposed the run, as SEARCH/TRIAL; no part of its identity."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = dict(given)
        tokens = fields.get("tokens")
        if isinstance(tokens, float) and tokens.is_integer():
            tokens = fields["tokens"] = int(tokens)
        if fields.get("report_every_tokens") is None and isinstance(tokens, int):
            fields["report_every_tokens"] = max(1, tokens // 20)
        fields["model"] = vocab_from_tokenizer(fields.get("model"), fields.get("data"))
        return fields

    @model_validator(mode="after")
    def _check(self) -> Self:
        per_pass = self.system.micro_batch * self.system.n_gpus * self.data.seq_len
        if self.optim.batch_tokens % per_pass:
            raise ValueError(
                "micro_batch x n_gpus x seq_len must divide batch_tokens: "
                f"{self.system.micro_batch} x {self.system.n_gpus} x {self.data.seq_len} = "
                f"{per_pass} does not divide {self.optim.batch_tokens}"
            )
        recorded = self.profile_steps
        if recorded is not None and not recorded[0] <= recorded[1] <= self.steps:
            raise ValueError(
                "profile_steps must be the first and the last of the run's steps to record: "
                f"{list(recorded)} in a run of {self.steps} steps"
            )
        if self.optim.trunk_tokens is not None:
            warmup = self.optim.warmup_fraction * self.optim.trunk_tokens
            stable_end = (1 - self.optim.decay_fraction) * self.tokens
            if self.optim.schedule == "wsd" and warmup > stable_end:
                raise ValueError(
                    "the warm-up must end before the decay begins: "
                    f"warmup_fraction x trunk_tokens = {warmup:,.0f} tokens, decay from "
                    f"{stable_end:,.0f} on; raise tokens or lower decay_fraction"
                )
        longest = self.model.max_positions
        if longest is not None and self.data.seq_len > longest:
            raise ValueError(
                f"data.seq_len must not exceed model.max_positions: {self.data.seq_len} tokens in "
                f"{longest} learned positions; shorten it or give the model more"
            )
        self._check_optimizer()
        bpe_vocab = self.data.bpe_vocab
        if bpe_vocab is not None and self.model.vocab < bpe_vocab:
            raise ValueError(
                f"model.vocab must hold the tokenizer: {self.model.vocab} is below the "
                f"{bpe_vocab} of {self.data.tokenizer}"
            )
        return self

    def _check_optimizer(self) -> None:
        if not self.system.strategy.startswith("zero"):
            return
        if self.optim.optimizer == "muon":
            raise ValueError(
                f"muon needs whole matrices and {self.system.strategy} cuts them into flat parts; "
                "use fsdp_full, fsdp_grad_op, hsdp or ddp, or optimizer adamw"
            )
        if self.system.cpu_offload and self.system.precision == "bf16_true":
            raise ValueError(
                f"{self.system.strategy} with cpu_offload keeps fp32 masters, precision is "
                "bf16_true; use amp_bf16, or an fsdp strategy"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.tokens // self.optim.batch_tokens)

    @property
    def grad_accum(self) -> int:
        """Forward passes per worker in one optimizer step."""
        per_pass = self.system.micro_batch * self.system.n_gpus * self.data.seq_len
        return self.optim.batch_tokens // per_pass

    @property
    def recipe_id(self) -> str:
        """Identity of the loss curve: model, optimizer, data and seed, whatever it runs on."""
        sections = {"model": self.model, "optim": self.optim, "data": self.data}
        return digest(
            {name: identity(spec) for name, spec in sections.items()} | {"seed": self.seed}
        )

    @property
    def trial_id(self) -> str:
        """Identity of the recipe on one system."""
        return digest({"recipe": self.recipe_id, "system": identity(self.system)})


class Progress(Spec):
    """One report of a run. Throughput and memory are measured."""

    status: Status
    """`running` until the last report."""
    step: NonNegativeInt
    """Optimizer steps since the run's beginning."""
    tokens: NonNegativeInt
    """Tokens since the run's beginning."""
    train_loss: float | None = None
    """Mean training loss in nats per token since the last report; None where all steps of it were
    skipped."""
    val_loss: float | None = None
    """Validation loss in nats per token."""
    val_bits_per_byte: float | None = None
    """Validation loss in bits per byte of text: comparable across tokenizers."""
    decayed: bool = False
    """Whether the learning rate is through at least half of its fall from the peak."""
    warming_up: bool = False
    """Whether the learning rate is still warming up."""
    tokens_per_s: float | None = None
    """Tokens per second and GPU since the last report, validation and checkpoints left out."""
    mfu: float | None = None
    """Share of the GPU's bf16 peak; None where no peak is known."""
    mfu_formula: str = FLOP_FORMULA
    """Formula of the FLOPs behind `mfu`."""
    peak_mem_gb: float | None = None
    """Largest memory of rank 0 in 1e9 bytes: CUDA allocations, on cpu the resident set."""
    grad_norm: float | None = None
    """Global gradient norm before clipping, of the last step."""
    skipped_steps: NonNegativeInt = 0
    """Steps since the last report that changed nothing, because their gradients were not finite."""
    grad_norm_max: float | None = None
    """Largest finite gradient norm since the last report."""
    grad_norm_median: float | None = None
    """Median of the finite gradient norms since the last report."""
    loss_spikes: NonNegativeInt | None = None
    """Steps since the last report whose loss stands far above the running level
    (`telemetry.Spikes`); None until the process has done enough steps to have a level."""
    data_wait_fraction: float | None = None
    """Share of the training time since the last report in which the host waited for batches, mean
    over ranks. On a GPU at most that is lost: work that was queued before goes on meanwhile."""
    communication_fraction: float | None = None
    """Share of one sampled step in which collectives ran and nothing was computed, mean over ranks;
    waiting for a rank that is late is in it. None in reports without a sample: a process that is
    alone has none, and the others one as often as costs half a percent of the time."""
    trace: str | None = None
    """Path of the profiler's trace, in the first report after it was written."""
    detail: str = ""
    """What happened, for statuses that need a word."""


class Measurement(Spec):
    """What a run gave: its last report, the curve and the last checkpoint."""

    final: Progress
    """The last report."""
    curve: tuple[Progress, ...]
    """All reports in order, the last included."""
    checkpoint: str | None
    """Folder or URL of the last complete checkpoint."""
    checkpoint_failures: tuple[str, ...] = ()
    """Checkpoints that could not be written, each with the reason; the run went on."""
    earlier_seconds: NonNegativeFloat = 0.0
    """Wall clock of this run's earlier starts, as far as their checkpoints know."""
    earlier_usd: NonNegativeFloat = 0.0
    """What they cost, at the prices they ran at."""

    @property
    def status(self) -> Status:
        """How the run ended."""
        return self.final.status

    @property
    def trace(self) -> str | None:
        """Path of the profiler's trace, None where `profile_steps` asked for none."""
        return next((report.trace for report in self.curve if report.trace), None)


def identity(spec: Spec) -> dict[str, Any]:
    """The fields that identity is the hash of."""
    fields = type(spec).model_fields
    return {
        name: value
        for name, value in spec.model_dump().items()
        if name not in ADDED_FIELDS or value != fields[name].default
    }


def vocab_from_tokenizer(model: Any, data: Any) -> Any:
    """Model fields with `vocab` taken from a `bpe:N` tokenizer unless it is given."""
    if not isinstance(model, dict) or "vocab" in model:
        return model
    tokenizer = (
        data.get("tokenizer") if isinstance(data, dict) else getattr(data, "tokenizer", None)
    )
    size = str(tokenizer or DataSpec().tokenizer).removeprefix("bpe:")
    return model | {"vocab": int(size)} if size.isdigit() else model


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of the SHA-256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
