"""Models on systems as columns: one entry per (model, system), ready for arithmetic on arrays.

Columns are named like the throughput rows of the design's section 6. Answer columns (tokens_per_s,
mfu, peak memory, oom) are no part of it, so an estimate cannot read them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thriftlm.catalog import Gpu, gpu
from thriftlm.planning.machine import Machine
from thriftlm.spec import InputError

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]
Cells = Sequence[Any] | NDArray[Any]

STRATEGIES = (
    "single",
    "ddp",
    "fsdp_full",
    "fsdp_grad_op",
    "hsdp",
    "zero1",
    "zero2",
    "zero3",
)
STACKS = ("eager", "fused", "compiled", "native", "thriftlm")
"""Torch; torch with fused kernels; torch.compile; CUDA without torch (llm.c); our own core."""
CHECKPOINTING = ("none", "selective", "full")
PRECISIONS = ("bf16", "amp_bf16", "bf16_true", "fp32", "fp8")
"""`fp8` is amp_bf16 with the products of blocks in fp8; embeddings and head stay in bf16."""
OPTIMIZERS = ("adamw", "adamw_8bit", "muon", "sgd")
"""Muon holds AdamW for embeddings and head; sgd has momentum."""
FP8_CAPABILITY = 8.9
"""First CUDA compute capability with fp8 tensor cores (Ada; CUDA programming guide, table 25)."""
MASTERS = ("fp32", "bf16", "unknown")
KERNELS = ("math", "fa1", "fa2", "fa3")

KERNEL_OF = {
    "math": "math",
    "flash": "fa2",
    "efficient": "fa1",  # memory-efficient attention is as fast as the first FlashAttention
    "cudnn": "fa3",
    "flex": "fa2",
    "fa1": "fa1",
    "fa2": "fa2",
    "fa3": "fa3",
    "fa4": "fa3",
}
"""Speed class of each attention kernel; torch's flash is FlashAttention-2."""

UNKNOWN = {
    "seq_len": 2048.0,
    "vocab": 50_304.0,
    "batch_tokens": 524_288.0,
    "n_gpus": 1.0,
    "internode_gbps": 100.0,
    "tokens_per_pass": 16_384.0,
    "largest_node": 8.0,
}
"""What an empty cell stands for where neither the row nor the catalog says more: a GPT-2
vocabulary and batch (its 0.5M tokens a step), 100 Gb/s Ethernet, 16k tokens per forward pass
(TinyLlama's)."""

GB_PER_S_OF_LANE = {"3": 0.985, "4": 1.969, "5": 3.938}
"""PCI Express payload in 1e9 bytes per second, lane and direction, by generation (PCI-SIG)."""
GIB = 2.0**30


@dataclass(frozen=True, eq=False)
class Systems:
    """Arrays of equal length (N,). What is unknown and matters is NaN, and so is what follows."""

    layers: Floats
    """Blocks as executed: shared ones count each time."""
    stored_layers: Floats
    """Blocks that hold parameters."""
    d_model: Floats
    n_heads: Floats
    n_kv_heads: Floats
    head_dim: Floats
    d_ff: Floats
    gated: Floats
    """1 where the feed-forward layer has a gate, which also says Llama-like norms and positions."""
    vocab: Floats
    tied: Floats
    seq_len: Floats
    span_tokens: Floats
    """Tokens that attention sees, mean over executed layers: seq_len, or less with windows."""
    block_matmul_params: Floats
    """Mean over executed layers."""
    stored_params: Floats
    flops_per_token: Floats
    """Of training, by the formula `6N+attn`."""
    n_gpus: Floats
    gpus_per_node: Floats
    micro_batch: Floats
    grad_accum: Floats
    strategy: Codes
    act_ckpt: Codes
    kernel: Codes
    stack: Codes
    optimizer: Codes
    fp32: Floats
    """1 where matrix products run in fp32."""
    fp8: Floats
    """1 where products of blocks run in fp8."""
    compiled: Floats
    """1 where torch.compile runs the blocks of our own stack; others say it by their name."""
    offloads: Floats
    """1 where sharded state lies in host memory."""
    fp32_masters: Floats
    """1 where parameters and optimizer state are fp32."""
    reduces_in_fp32: Floats
    """1 where gradients travel as fp32."""
    peak_flops: Floats
    """Of the GPU, dense bf16 per second; of a worker on a CPU, what was measured."""
    fp32_peak_flops: Floats
    """The same in fp32, without TF32."""
    on_cpu: Floats
    """1 where workers are threads of a CPU."""
    capability: Floats
    """CUDA compute capability."""
    half_rate: Floats
    """1 where fp32 accumulation, which the peak is of, runs at half the tensor cores' rate."""
    memory_bytes: Floats
    """What the driver reports, else the nominal memory."""
    memory_bytes_per_s: Floats
    link_bytes_per_s: Floats
    """Between GPUs of one node, one direction: NVLink, else PCI Express."""
    has_nvlink: Floats
    node_bytes_per_s: Floats
    """Network of a node, one direction."""
    host_bytes_per_s: Floats
    """PCI Express to host memory, one direction."""

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def tokens(self) -> Floats:
        """Tokens of one GPU in one forward pass."""
        return self.micro_batch * self.seq_len

    def take(self, index: Any) -> "Systems":
        """The entries of an index or mask."""
        return Systems(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def uses(self, *strategies: str) -> NDArray[np.bool_]:
        """Where the strategy is one of those named."""
        return np.isin(self.strategy, [STRATEGIES.index(name) for name in strategies])


def from_table(table: Mapping[str, Cells], machine: Machine | None = None) -> Systems:
    """Systems of a table's columns: texts or numbers, an empty cell means unknown.

    `stored_layers`, `stored_params`, `span_tokens` and `block_matmul_params` may be given for
    models whose shape the other columns do not tell; else they follow from it. `peak_bf16_tflops`,
    `peak_fp32_tflops`, `memory_gb_per_s` and `memory_gb` go before what the catalog has of the GPU,
    or `machine` of the CPUs that one worker gets.

    Raises:
        InputError: unknown GPU or word; names the column.
    """
    columns = _Columns(table)
    return Systems(**_model(columns), **_training(columns), **_hardware(columns, machine))


class _Columns:
    """A table's columns by name, as numbers or as codes; an absent column is all empty."""

    def __init__(self, table: Mapping[str, Cells]) -> None:
        self.table = table
        self.length = len(next(iter(table.values())))

    def number(self, name: str, default: Floats | float = np.nan) -> Floats:
        """Values, with the default where a cell is empty."""
        found = np.full(self.length, np.nan)
        if name in self.table:
            found = _numbers(self.table[name], name)
        return np.where(np.isnan(found), default, found)

    def code(self, name: str, words: Sequence[str], default: str) -> Codes:
        """Positions of the cells in `words`."""
        return self.mapped(name, {word: i for i, word in enumerate(words)}, default).astype(int)

    def mapped(self, name: str, values: Mapping[str, Any], default: str) -> NDArray[Any]:
        """What each cell stands for; an empty or unknown cell is the default."""
        if name not in self.table:
            return np.full(self.length, values[default])
        words, which = distinct(self.table[name])
        return np.asarray([_look_up(name, str(word), values, default) for word in words])[which]

    def gpus(self) -> tuple[list[Gpu], NDArray[np.intp]]:
        """The GPUs that occur, and which of them each entry has."""
        if "gpu" not in self.table:
            raise InputError("a table of systems needs the column gpu")
        names, which = distinct(self.table["gpu"])
        return [gpu(str(name)) for name in names], which


def distinct(cells: Cells) -> tuple[list[Any], NDArray[np.intp]]:
    """The different cells in order of appearance, and which of them each cell is.

    Columns of systems repeat few values: a dict finds them ten times faster than a sort.
    """
    known: dict[Any, int] = {}
    listed = cells.tolist() if isinstance(cells, np.ndarray) else cells
    which = np.fromiter(
        (known.setdefault(cell, len(known)) for cell in listed), np.intp, len(listed)
    )
    return list(known), which


def _numbers(cells: Cells, name: str) -> Floats:
    if isinstance(cells, np.ndarray) and cells.dtype.kind in "fiub":
        return cells.astype(float)
    words, which = distinct(cells)
    try:
        return np.array([float("nan" if word == "" else word) for word in words])[which]
    except ValueError as error:
        raise InputError(f"{name} must hold numbers or empty cells: {error}") from error


def _look_up(name: str, word: str, values: Mapping[str, Any], default: str) -> Any:
    if word in ("", "unknown", "nan"):
        return values[default]
    if word not in values:
        raise InputError(f"{name}: unknown '{word}'; known: {', '.join(values)}")
    return values[word]


def _model(columns: _Columns) -> dict[str, Any]:
    d_model, layers = columns.number("d_model"), columns.number("n_layers")
    gated = columns.mapped("mlp", {"gated": 1.0, "plain": 0.0}, "gated")
    n_heads = columns.number("n_heads", np.maximum(1.0, d_model // 64))
    n_kv_heads = columns.number("n_kv_heads", n_heads)
    head_dim = columns.number("head_dim", d_model / n_heads)
    d_ff = columns.number("d_ff", np.where(gated > 0, 8 / 3, 4.0) * d_model)
    vocab = columns.number("vocab", UNKNOWN["vocab"])
    tied = columns.mapped("tied_embeddings", {"yes": 1.0, "no": 0.0}, "no")
    seq_len = columns.number("seq_len", UNKNOWN["seq_len"])
    span = columns.number("span_tokens", seq_len)
    heads = (2 * n_heads + 2 * n_kv_heads) * head_dim * d_model
    block = columns.number("block_matmul_params", heads + (2 + gated) * d_model * d_ff)
    stored_layers = columns.number("stored_layers", layers)
    stored = (block + 2 * d_model) * stored_layers + vocab * d_model * (2 - tied) + d_model
    attention = 12 * layers * n_heads * head_dim * span
    return {
        "layers": layers,
        "stored_layers": stored_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "d_ff": d_ff,
        "gated": gated,
        "vocab": vocab,
        "tied": tied,
        "seq_len": seq_len,
        "span_tokens": span,
        "block_matmul_params": block,
        "stored_params": columns.number("stored_params", stored),
        "flops_per_token": 6 * (layers * block + vocab * d_model) + attention,
    }


def _training(columns: _Columns) -> dict[str, Any]:
    n_gpus = columns.number("n_gpus", UNKNOWN["n_gpus"])
    seq_len = columns.number("seq_len", UNKNOWN["seq_len"])
    accum = columns.number("grad_accum")
    batch_tokens = columns.number("global_batch_tokens")
    by_batch = batch_tokens / (n_gpus * seq_len * np.where(np.isnan(accum), 1.0, accum))
    usual = np.maximum(1.0, UNKNOWN["tokens_per_pass"] // seq_len)
    micro_batch = columns.number("micro_batch", np.where(by_batch >= 1, by_batch, usual))
    batch_tokens = np.where(np.isnan(batch_tokens), UNKNOWN["batch_tokens"], batch_tokens)
    by_tokens = np.maximum(1.0, np.round(batch_tokens / (micro_batch * n_gpus * seq_len)))
    precision = columns.code("precision", PRECISIONS, "amp_bf16")
    masters = columns.code("master_weights", MASTERS, "unknown")
    pure = (masters == MASTERS.index("bf16")) | (precision == PRECISIONS.index("bf16_true"))
    unsaid = (precision == PRECISIONS.index("bf16")) & (masters == MASTERS.index("unknown"))
    return {
        "n_gpus": n_gpus,
        "micro_batch": micro_batch,
        "grad_accum": np.where(np.isnan(accum), by_tokens, accum),
        "strategy": _strategy(columns, n_gpus),
        "act_ckpt": columns.code("act_ckpt", CHECKPOINTING, "none"),
        "kernel": _kernel(columns),
        "stack": _stack(columns),
        "optimizer": columns.code("optimizer", OPTIMIZERS, "adamw"),
        "compiled": _yes(columns, "compiled"),
        "offloads": _yes(columns, "cpu_offload"),
        "fp32": (precision == PRECISIONS.index("fp32")).astype(float),
        "fp8": (precision == PRECISIONS.index("fp8")).astype(float),
        "fp32_masters": (~pure).astype(float),
        "reduces_in_fp32": (~pure & ~unsaid).astype(float),
    }


def _strategy(columns: _Columns, n_gpus: Floats) -> Codes:
    """A sharding strategy on one GPU shards nothing: it is `single`, unless it offloads."""
    found = columns.code("strategy", STRATEGIES, "single")
    several = np.where(found == 0, STRATEGIES.index("ddp"), found)
    return np.where((n_gpus > 1) | (_yes(columns, "cpu_offload") > 0), several, 0)


def _kernel(columns: _Columns) -> Codes:
    codes = {word: KERNELS.index(kernel) for word, kernel in KERNEL_OF.items()}
    by_attention = columns.mapped("attention", codes, "flash")
    by_version = columns.mapped("attention_version", codes | {"unsaid": -1}, "unsaid")
    return np.where(by_version < 0, by_attention, by_version).astype(int)


def _stack(columns: _Columns) -> Codes:
    """Who does not name the stack publishes a tuned one; who compiles an eager one compiles."""
    found = columns.code("stack", STACKS, "compiled")
    eager = found == STACKS.index("eager")
    return np.where(eager & (_yes(columns, "compiled") > 0), STACKS.index("compiled"), found)


def _yes(columns: _Columns, name: str) -> Floats:
    """1 where a cell says yes."""
    return columns.mapped(name, {"yes": 1.0, "no": 0.0}, "no").astype(float)


def _hardware(columns: _Columns, machine: Machine | None) -> dict[str, Any]:
    found, which = columns.gpus()
    n_gpus = columns.number("n_gpus", UNKNOWN["n_gpus"])

    def of(value: Any) -> Floats:
        known = [np.nan if (x := value(entry)) is None else float(x) for entry in found]
        return np.asarray(known)[which]

    capability, peak = of(lambda entry: entry.compute_capability), of(lambda e: e.bf16_tflops)
    nvlink = of(lambda entry: entry.nvlink_gb_per_s or 0.0)
    pcie = of(lambda entry: pcie_gb_per_s(entry.pcie))
    network = of(lambda entry: entry.node_network_gbit_per_s)
    network = np.where(np.isnan(network), UNKNOWN["internode_gbps"], network)
    catalogued = {
        "gpus_per_node": of(lambda entry: entry.gpus_per_node or UNKNOWN["largest_node"]),
        "peak_bf16_tflops": peak,
        "peak_fp32_tflops": of(lambda entry: entry.fp32_tflops),
        "memory_gb_per_s": of(lambda entry: entry.memory_gb_per_s),
        "memory_gb": of(lambda entry: entry.usable_memory_gib) * GIB / 1e9,
    }
    on_cpu = of(lambda entry: entry.id == "cpu")
    if machine:
        of_worker = machine.of_worker(n_gpus, columns.number("cpus_per_worker", 1.0))
        catalogued = {
            name: np.where(on_cpu > 0, of_worker[name], value) for name, value in catalogued.items()
        }
    had = {name: columns.number(name, value) for name, value in catalogued.items()}
    return {
        "gpus_per_node": np.minimum(had["gpus_per_node"], n_gpus),
        "peak_flops": had["peak_bf16_tflops"] * 1e12,
        "fp32_peak_flops": had["peak_fp32_tflops"] * 1e12,
        "on_cpu": on_cpu,
        "half_rate": of(lambda entry: entry.product.startswith("GeForce")),
        "capability": capability,
        "memory_bytes": had["memory_gb"] * 1e9,
        "memory_bytes_per_s": had["memory_gb_per_s"] * 1e9,
        "link_bytes_per_s": np.where(nvlink > 0, nvlink / 2, pcie) * 1e9,
        "has_nvlink": (nvlink > 0).astype(float),
        "host_bytes_per_s": pcie * 1e9,
        "node_bytes_per_s": columns.number("internode_gbps", network) / 8 * 1e9,
    }


def pcie_gb_per_s(link: str | None) -> float:
    """Payload of a PCI Express link in 1e9 bytes per second and direction; `Gen4 x16` unsaid."""
    generation, _, lanes = (link or "Gen4 x16").removeprefix("Gen").partition(" x")
    return GB_PER_S_OF_LANE[generation] * int(lanes)
