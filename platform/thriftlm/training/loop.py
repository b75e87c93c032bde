"""The training loop: steps, reports, validation, checkpoints, and how a run ends."""

import math
import resource
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from thriftlm import catalog
from thriftlm.spec import InputError, Measurement, Progress, RunSpec, Status
from thriftlm.training import checkpoint
from thriftlm.training.batches import Batches, validation_batches
from thriftlm.training.checkpoint_files import Location
from thriftlm.training.checkpoint_writer import Writer
from thriftlm.training.divergence import Divergence
from thriftlm.training.engine import build_engine, check_attention
from thriftlm.training.mixture import Mixture, build
from thriftlm.training.prefetch import Prefetch
from thriftlm.training.ranks import Ranks, joined
from thriftlm.training.schedule import has_decayed, is_warming_up, learning_rate
from thriftlm.training.shard_files import TOKENIZER
from thriftlm.training.telemetry import Interval, Reading, Telemetry
from thriftlm_models.counts import FLOP_FORMULA, flops_per_token
from thriftlm_models.documents import Packing

OUT_OF_MEMORY_SIGNS = (
    "allocate memory",  # torch's CPU allocator
    "std::bad_alloc",  # the rest of its C++
    "CUDA error: out of memory",  # the driver, outside of torch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What plain RuntimeErrors of torch say when memory ran out."""


class Decision(Enum):
    """Answer to a report."""

    CONTINUE = "continue"
    STOP = "stop"


Report = Callable[[Progress, Location | None], Decision]
"""Called on every rank at each report, with the checkpoint when one was completed since the last.

Checkpoints are written in the background: it may be one of an earlier step.
"""


class OutOfMemoryOnOneRankError(Exception):
    """This rank ran out of memory while the others wait for it: the launcher must end them."""

    def __init__(self, measured: Measurement) -> None:
        super().__init__(measured.final.detail)
        self.measured = measured


def train(
    spec: RunSpec,
    report: Report,
    *,
    cache: Path,
    output: Location,
    go_on: bool = False,
    resume_from: Location | None = None,
    branch_from: Location | None = None,
    usd_per_hour: float = 0.0,
) -> Measurement:
    """What the run measured; running out of memory and diverging are results, not errors.

    Every rank calls it. The answer to a report counts when any rank says stop.

    Args:
        spec: the run.
        report: called on every rank at each report.
        cache: folder of token shards; built when missing.
        output: folder for checkpoints, or the URL of one in an object store.
        go_on: go on from the newest undamaged checkpoint in `output`, if there is one.
        resume_from: a checkpoint of this run to go on from.
        branch_from: a checkpoint of another run, whose steps so far are this one's too
            (`schedule`); only where `output` has none to go on from.
        usd_per_hour: of everything billed, for the ledger in the checkpoints.

    Raises:
        InputError: wrong number of processes, no such GPU, bad corpus, vocabulary smaller than the
            tokenizer's, attention kernel that cannot run here, foreign checkpoint.
        OutOfMemoryOnOneRankError: out of memory in a run of several ranks.
    """
    with joined(spec.system) as ranks:
        run = Run(spec, report, ranks, output, usd_per_hour)
        try:
            run.set_up(cache)
            run.find_beginning(output if go_on else None, resume_from, branch_from)
            return run.go()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = f"out of memory on rank {ranks.rank}: {(str(error).splitlines() or [''])[0]}"
            measured = run.out_of_memory(reason)
            if ranks.world_size > 1:
                raise OutOfMemoryOnOneRankError(measured) from error
            report(measured.final, None)
            return measured
        finally:
            run.close()


class Run:
    """One run in progress on one rank."""

    def __init__(
        self,
        spec: RunSpec,
        report: Report,
        ranks: Ranks,
        output: Location,
        usd_per_hour: float = 0.0,
    ) -> None:
        self.spec, self.report, self.ranks = spec, report, ranks
        self.begin, self.usd_per_hour = time.perf_counter(), usd_per_hour
        self.earlier = checkpoint.Spent()
        self.parent: checkpoint.Parent | None = None
        every = spec.keep_every_tokens
        self.writer = Writer(
            output,
            ranks,
            last=spec.keep_checkpoints,
            every_steps=None if every is None else steps_of(every, spec),
        )
        self.step = 0
        traces = output if isinstance(output, Path) else Path.cwd()
        self.telemetry = Telemetry(spec, ranks, traces)
        self.divergence = Divergence()
        self.curve: list[Progress] = []
        self.saved_step = 0  # of the last one that was begun: the same on all ranks
        self.batches: Prefetch | None = None

    def close(self) -> None:
        """End what runs beside the loop."""
        self.telemetry.trace.abandon()
        if self.batches is not None:
            self.batches.close()

    def set_up(self, cache: Path) -> None:
        """Data and weights."""
        spec, ranks = self.spec, self.ranks
        check_attention(spec, ranks.device)
        self.shards = build(spec.data, cache)
        check_vocab(spec, self.shards)
        self.packing = packing_of(spec, self.shards)
        self.engine = build_engine(spec, ranks, self.packing)
        batches = Batches(
            self.shards,
            seq_len=spec.data.seq_len,
            batch_sequences=spec.optim.batch_tokens // spec.data.seq_len,
            micro_batch=spec.system.micro_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=spec.seed,
            packing=spec.data.packing,
        )
        self.batches = Prefetch(batches, spec.steps, ranks.device)

    def find_beginning(
        self, own: Location | None, resume_from: Location | None, branch_from: Location | None
    ) -> None:
        """Where the run had been: by a given checkpoint, its own last one, or its trunk's."""
        engine, spec, ranks = self.engine, self.spec, self.ranks
        if resume_from is not None:
            state, address = checkpoint.load_named(resume_from, engine, spec, ranks), resume_from
        elif own is not None and (found := checkpoint.resume(own, engine, spec, ranks)):
            state, address = found
        elif branch_from is not None:
            state = checkpoint.load_named(branch_from, engine, spec, ranks, branch=True)
            address = branch_from
        else:
            return
        self.step = self.saved_step = state.step
        self.curve, self.earlier, self.parent = list(state.curve), state.spent, state.parent
        self.writer.written = address

    def go(self) -> Measurement:
        """Train from the present step to the end, a stop or a failure.

        A resumed run first reports what it had measured before: whoever listens may have been
        killed after the checkpoint and before hearing of it.
        """
        answers = [self.report(progress, self.writer.written) for progress in self.curve]
        if self.curve and self.curve[-1].status != "running":
            return self.end()
        if self.ranks.any(Decision.STOP in answers):
            return self.stop()
        report_steps = steps_of(self.spec.report_every_tokens, self.spec)
        while True:
            until = min(self.spec.steps, (self.step // report_steps + 1) * report_steps)
            progress = self.advance(until)
            self.curve.append(progress)
            over = progress.status != "running"
            if self.is_checkpoint_due(over):
                self.save()
            if over:
                self.writer.wait()
            decision = self.report(progress, self.writer.news())
            if over:
                return self.end()
            if self.ranks.any(decision is Decision.STOP):
                return self.stop()

    def stop(self) -> Measurement:
        """End early, as the answer to a report asked; what is trained so far is kept."""
        if self.saved_step < self.step:
            self.save()
        self.curve[-1] = self.curve[-1].model_copy(update={"status": "stopped"})
        return self.end()

    def end(self) -> Measurement:
        """All that was measured, once the last checkpoint is written."""
        self.writer.close()
        return self.measurement()

    def out_of_memory(self, reason: str) -> Measurement:
        """What a run that ended because memory ran out gave; its curve up to here stays."""
        progress = Progress(
            status="oom",
            step=self.step,
            tokens=self.step * self.spec.optim.batch_tokens,
            detail=reason,
        )
        self.curve.append(progress)
        if self.ranks.world_size == 1:
            self.writer.wait()
        return self.measurement()

    def advance(self, until: int) -> Progress:
        """Train up to step `until`, validate and report."""
        measured = self.measured(until - self.step)
        before = [report.train_loss for report in self.curve] or [measured.first_loss]
        diverged = self.divergence.reason(measured.train_loss, before)
        val_loss = None if diverged else self.validate()
        if val_loss is not None and not math.isfinite(val_loss):
            diverged, val_loss = "validation loss is not finite", None
        return self.progress(measured, val_loss, diverged)

    def measured(self, steps: int) -> Reading:
        """Train so many steps, or until the run is lost, and measure them."""
        interval, until = Interval(self.telemetry, steps), self.step + steps
        while self.step < until and not self.divergence.is_lost:
            with interval.step(self.step + 1):
                loss_sum, norm = self.train_step(interval)
            interval.add(loss_sum, norm)
            self.divergence.after_step(norm)
        interval.pause()
        return self.telemetry.reading(interval)

    def rate(self, measured: Reading) -> float | None:
        """Tokens per second per GPU; None where no step was timed."""
        if not measured.timed_steps:
            return None
        tokens = measured.timed_steps * self.spec.optim.batch_tokens
        return tokens / measured.seconds / self.spec.system.n_gpus

    def train_step(self, interval: Interval) -> tuple[Tensor, float]:
        """One optimizer step; this rank's losses summed, on the device, and the gradient norm."""
        total = torch.zeros((), device=self.ranks.device)
        count = self.spec.grad_accum
        assert self.batches is not None
        if self.packing is not None:
            self.packing.real_share = self.batches.real_share(self.step)
        batches = interval.waiting_for(self.batches.at(self.step))
        for index, batch in enumerate(batches, start=1):
            on_device = batch.to(self.ranks.device, non_blocking=True)
            total += self.engine.accumulate(on_device, last=index == count)
        norm = self.engine.step(learning_rate(self.spec.optim, self.step, self.spec.steps))
        self.step += 1
        return total, norm

    def validate(self) -> float:
        """Mean validation loss over the first `validation_tokens`, in nats per token."""
        total, count = 0.0, 0
        if self.packing is not None:
            self.packing.real_share = 1.0  # windows have no padding
        with self.engine.evaluating():
            for batch, real in validation_batches(
                self.shards,
                seq_len=self.spec.data.seq_len,
                tokens=self.spec.validation_tokens,
                micro_batch=self.spec.system.micro_batch,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
            ):
                total += float(self.engine.loss(batch.to(self.ranks.device))) * real
                count += real
        total, sequences = self.ranks.sum(total, count)
        return total / sequences

    def progress(self, measured: Reading, val_loss: float | None, diverged: str) -> Progress:
        """The report of the present step; `diverged` says why the run is lost, if it is."""
        spec = self.spec
        tokens_per_s = self.rate(measured)
        status: Status = "running"
        if diverged:
            status = "diverged"
        elif self.step >= spec.steps:
            status = "done"
        return Progress(
            status=status,
            step=self.step,
            tokens=self.step * spec.optim.batch_tokens,
            train_loss=measured.train_loss,
            skipped_steps=measured.skipped_steps,
            val_loss=val_loss,
            val_bits_per_byte=bits_per_byte(val_loss, self.shards.bytes_per_token("validation")),
            decayed=has_decayed(spec.optim, self.step, spec.steps),
            warming_up=is_warming_up(spec.optim, self.step, spec.steps),
            tokens_per_s=tokens_per_s,
            mfu=flops_utilisation(spec, tokens_per_s),
            mfu_formula=FLOP_FORMULA,
            peak_mem_gb=peak_memory_gb(self.ranks.device),
            grad_norm=measured.grad_norm,
            grad_norm_max=measured.grad_norm_max,
            grad_norm_median=measured.grad_norm_median,
            loss_spikes=measured.loss_spikes,
            data_wait_fraction=measured.data_wait_fraction,
            communication_fraction=measured.communication_fraction,
            trace=self.telemetry.trace.take(),
            detail=diverged,
        )

    def is_checkpoint_due(self, over: bool) -> bool:
        """Whether to write one now: at the end, and every `checkpoint_every_tokens`."""
        if over:
            return self.curve[-1].status == "done"
        every = self.spec.checkpoint_every_tokens
        if every is None:
            return False
        return self.step - self.saved_step >= steps_of(every, self.spec)

    def save(self) -> None:
        """Begin a checkpoint of the present state."""
        seconds = time.perf_counter() - self.begin
        state = checkpoint.RunState(
            run=self.spec,
            step=self.step,
            tokens=self.step * self.spec.optim.batch_tokens,
            curve=tuple(self.curve),
            spent=self.earlier.plus(seconds, self.usd_per_hour),
            parent=self.parent,
        )
        texts = {
            checkpoint.STATE: state.model_dump_json(),
            TOKENIZER: self.shards.tokenizer_path.read_text(encoding="utf-8"),
        }
        self.writer.save(self.step, self.engine.state(), texts)
        self.saved_step = self.step

    def measurement(self) -> Measurement:
        """All that was measured so far."""
        return Measurement(
            final=self.curve[-1],
            curve=tuple(self.curve),
            checkpoint=str(self.writer.written) if self.writer.written else None,
            checkpoint_failures=tuple(self.writer.failures),
            earlier_seconds=self.earlier.seconds,
            earlier_usd=self.earlier.usd,
        )


def packing_of(spec: RunSpec, shards: Mixture) -> Packing | None:
    """What the decoder must know of the documents in a sequence; None where they do not matter."""
    if spec.data.packing == "stream" and not spec.data.document_mask:
        return None
    return Packing(shards.end_id, spec.data.document_mask)


def check_vocab(spec: RunSpec, shards: Mixture) -> None:
    """Nothing, where the model has a row for every id of the tokenizer.

    Raises:
        InputError: it has fewer.
    """
    if spec.model.vocab < shards.vocab:
        raise InputError(
            f"model.vocab must hold the tokenizer: {spec.model.vocab} is below the {shards.vocab} "
            f"of {spec.data.tokenizer}; set model.vocab to at least {shards.vocab}"
        )


def steps_of(tokens: int, spec: RunSpec) -> int:
    """Whole optimizer steps nearest to a number of tokens, at least one."""
    return max(1, round(tokens / spec.optim.batch_tokens))


def bits_per_byte(nats_per_token: float | None, bytes_per_token: float) -> float | None:
    """Loss in bits per byte of text, None without a loss."""
    if nats_per_token is None:
        return None
    return nats_per_token / math.log(2) / bytes_per_token


def flops_utilisation(spec: RunSpec, tokens_per_s: float | None) -> float | None:
    """Share of the GPU's bf16 peak by formula `6N+attn`; None where no peak is known."""
    peak = catalog.gpu(spec.system.gpu).bf16_tflops
    if peak is None or tokens_per_s is None:
        return None
    return flops_per_token(spec.model, spec.data.seq_len) * tokens_per_s / (peak * 1e12)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in 1e9 bytes: CUDA allocations, on cpu this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # KiB on Linux


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that device or host memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS)
