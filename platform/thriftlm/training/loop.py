"""The training loop: steps, reports, validation, checkpoints, and how a run ends."""

import math
import resource
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import torch

from thriftlm import catalog
from thriftlm.spec import InputError, Measurement, Progress, RunSpec, Status
from thriftlm.training import checkpoint
from thriftlm.training.batches import Batches, validation_batches
from thriftlm.training.engine import build_engine, check_attention
from thriftlm.training.mixture import Mixture, build
from thriftlm.training.prefetch import Prefetch
from thriftlm.training.ranks import Ranks, joined
from thriftlm.training.schedule import has_decayed, is_warming_up, learning_rate
from thriftlm_models.counts import FLOP_FORMULA, flops_per_token
from thriftlm_models.documents import Packing

DIVERGED_NATS = 1.0
"""A training loss this far above the best report of its run, in nats, counts as divergence.

Until there is a report, the loss of the untrained model stands in. Loss spikes that recover stay
well under it; a run that passes it does not come back within the horizon of a trial. Ours, from
runs of this package; not a published constant.
"""
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


Report = Callable[[Progress, Path | None], Decision]
"""Called on every rank at each report, with the checkpoint when one was just written."""


class OutOfMemoryOnOneRankError(Exception):
    """This rank ran out of memory while the others wait for it: the launcher must end them."""

    def __init__(self, measured: Measurement) -> None:
        super().__init__(measured.final.detail)
        self.measured = measured


def train(
    spec: RunSpec, report: Report, *, cache: Path, output: Path, resume_from: Path | None = None
) -> Measurement:
    """What the run measured; running out of memory and diverging are results, not errors.

    Every rank calls it. The answer to a report counts when any rank says stop.

    Args:
        spec: the run.
        report: called on every rank at each report.
        cache: folder of token shards; built when missing.
        output: folder for checkpoints.
        resume_from: a checkpoint to go on from.

    Raises:
        InputError: wrong number of processes, no such GPU, bad corpus, vocabulary smaller than the
            tokenizer's, attention kernel that cannot run here, foreign checkpoint.
        OutOfMemoryOnOneRankError: out of memory in a run of several ranks.
    """
    with joined(spec.system) as ranks:
        run = Run(spec, report, ranks, output)
        try:
            run.set_up(cache, resume_from)
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

    def __init__(self, spec: RunSpec, report: Report, ranks: Ranks, output: Path) -> None:
        self.spec, self.report, self.ranks, self.output = spec, report, ranks, output
        self.step = 0
        self.first_step = 0  # of this process
        self.curve: list[Progress] = []
        self.saved: Path | None = None
        self.saved_step = 0
        self.batches: Prefetch | None = None

    def close(self) -> None:
        """End what runs beside the loop."""
        if self.batches is not None:
            self.batches.close()

    def set_up(self, cache: Path, resume_from: Path | None) -> None:
        """Data, weights and, when resuming, where the run had been."""
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
        if resume_from is not None:
            state = checkpoint.load(resume_from, self.engine, spec)
            self.step = self.first_step = self.saved_step = state.step
            self.curve, self.saved = list(state.curve), resume_from

    def go(self) -> Measurement:
        """Train from the present step to the end, a stop or a failure.

        A resumed run first reports what it had measured before: whoever listens may have been
        killed after the checkpoint and before hearing of it.
        """
        answers = [self.report(progress, self.saved) for progress in self.curve]
        if self.curve and self.curve[-1].status != "running":
            return self.measurement()
        if self.ranks.any(Decision.STOP in answers):
            return self.stop()
        report_steps = steps_of(self.spec.report_every_tokens, self.spec)
        while True:
            until = min(self.spec.steps, (self.step // report_steps + 1) * report_steps)
            progress = self.advance(until)
            self.curve.append(progress)
            over = progress.status != "running"
            written = self.save() if self.is_checkpoint_due(over) else None
            decision = self.report(progress, written)
            if over:
                return self.measurement()
            if self.ranks.any(decision is Decision.STOP):
                return self.stop()

    def stop(self) -> Measurement:
        """End early, as the answer to a report asked; what is trained so far is kept."""
        if self.saved_step < self.step:
            self.save()
        self.curve[-1] = self.curve[-1].model_copy(update={"status": "stopped"})
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
        return self.measurement()

    def advance(self, until: int) -> Progress:
        """Train up to step `until` and measure."""
        losses: list[float] = []
        norm, timed_steps, seconds = 0.0, 0, 0.0
        # A gradient that is not finite ends the run: torch ruins the weights with it, DeepSpeed
        # skips the step in silence. The norm is the same on all ranks.
        while self.step < until and math.isfinite(norm):
            is_warm = self.step > self.first_step  # the first step of a process pays set-up
            begin = self.clock()
            loss, norm = self.train_step()
            losses.append(loss)
            if is_warm:
                seconds += self.clock() - begin
                timed_steps += 1
        train_loss, first_loss = self.ranks.mean(sum(losses) / len(losses), losses[0])
        diverged = not math.isfinite(norm) or self.is_far_above(train_loss, first_loss)
        val_loss = None if diverged else self.validate()
        if val_loss is not None and not math.isfinite(val_loss):
            diverged, val_loss = True, None
        return self.progress(train_loss, val_loss, norm, timed_steps, seconds, diverged)

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; this rank's mean loss and the global gradient norm."""
        total = torch.zeros((), device=self.ranks.device)
        count = self.spec.grad_accum
        assert self.batches is not None
        if self.packing is not None:
            self.packing.real_share = self.batches.real_share(self.step)
        for index, batch in enumerate(self.batches.at(self.step), start=1):
            on_device = batch.to(self.ranks.device, non_blocking=True)
            total += self.engine.accumulate(on_device, last=index == count)
        norm = self.engine.step(learning_rate(self.spec.optim, self.step, self.spec.steps))
        self.step += 1
        return float(total) / count, norm

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

    def is_far_above(self, loss: float, first_loss: float) -> bool:
        """Whether a loss lies `DIVERGED_NATS` above the best report of this run, or is not finite.

        Before the first report, `first_loss` of the interval counts instead. Both are means over
        the ranks, so that all of them come to the same answer.
        """
        best = min(
            (p.train_loss for p in self.curve if p.train_loss is not None), default=first_loss
        )
        return not loss <= best + DIVERGED_NATS  # true of NaN

    def progress(
        self,
        train_loss: float,
        val_loss: float | None,
        norm: float,
        timed_steps: int,
        seconds: float,
        diverged: bool,
    ) -> Progress:
        """The report of the present step."""
        spec = self.spec
        tokens_per_s = None
        if timed_steps:
            tokens_per_s = timed_steps * spec.optim.batch_tokens / seconds / spec.system.n_gpus
        status: Status = "running"
        if diverged:
            status = "diverged"
        elif self.step >= spec.steps:
            status = "done"
        return Progress(
            status=status,
            step=self.step,
            tokens=self.step * spec.optim.batch_tokens,
            train_loss=train_loss if math.isfinite(train_loss) else None,
            val_loss=val_loss,
            val_bits_per_byte=bits_per_byte(val_loss, self.shards.bytes_per_token("validation")),
            decayed=has_decayed(spec.optim, self.step, spec.steps),
            warming_up=is_warming_up(spec.optim, self.step, spec.steps),
            tokens_per_s=tokens_per_s,
            mfu=flops_utilisation(spec, tokens_per_s),
            mfu_formula=FLOP_FORMULA,
            peak_mem_gb=peak_memory_gb(self.ranks.device),
            grad_norm=norm if math.isfinite(norm) else None,
            detail="loss or gradient not finite, or loss far above its best" if diverged else "",
        )

    def is_checkpoint_due(self, over: bool) -> bool:
        """Whether to write one now: at the end, and every `checkpoint_every_tokens`."""
        if over:
            return self.curve[-1].status == "done"
        every = self.spec.checkpoint_every_tokens
        if every is None:
            return False
        return self.step - self.saved_step >= steps_of(every, self.spec)

    def save(self) -> Path:
        """Write a checkpoint of the present state."""
        state = checkpoint.RunState(run=self.spec, step=self.step, curve=tuple(self.curve))
        self.saved = checkpoint.save(
            self.output, self.engine, self.ranks, state, self.shards.tokenizer_path
        )
        self.saved_step = self.step
        return self.saved

    def measurement(self) -> Measurement:
        """All that was measured so far."""
        return Measurement(
            final=self.curve[-1],
            curve=tuple(self.curve),
            checkpoint=str(self.saved) if self.saved else None,
        )

    def clock(self) -> float:
        """Seconds on a steady clock, with the device's work done."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


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
