"""The loop in one process: what it reports, how it ends, and what it refuses."""

import itertools
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from thriftlm.spec import InputError, Measurement, Progress, RunSpec
from thriftlm.training.divergence import SKIPS_IN_A_ROW
from thriftlm.training.engine import TorchEngine
from thriftlm.training.loop import Decision, flops_utilisation, is_out_of_memory, train
from thriftlm.training.mixture import build
from thriftlm.training.tokenizer import make_tokenizer
from thriftlm_models.counts import flops_per_token

STEPS = 20
BATCH_TOKENS = 256


def curve(measured: Measurement, field: str) -> list[Any]:
    return [getattr(report, field) for report in measured.curve]


def losses(measured: Measurement) -> list[Any]:
    return curve(measured, "train_loss") + curve(measured, "val_loss")


@pytest.fixture(scope="module")
def whole(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    """The tiny run, uninterrupted."""
    measured: Measurement = bench.train(bench.spec(), tmp_path_factory.mktemp("whole"))
    return measured


def test_same_seed_gives_the_same_losses_bit_for_bit(bench, whole, tmp_path):
    again = bench.train(bench.spec(), tmp_path)
    assert losses(again) == losses(whole)
    assert curve(again, "grad_norm") == curve(whole, "grad_norm")


def test_another_seed_gives_other_losses(bench, whole, tmp_path):
    other = bench.train(bench.spec(seed=1, tokens=BATCH_TOKENS), tmp_path)
    assert other.curve[0].train_loss != whole.curve[0].train_loss
    assert other.curve[0].val_loss != whole.curve[0].val_loss


def test_loss_begins_at_guessing_and_falls(bench, whole):
    assert whole.curve[0].train_loss == pytest.approx(math.log(bench.spec().model.vocab), abs=0.1)
    assert whole.final.val_loss < whole.curve[0].val_loss - 1


def test_reports_come_at_every_interval_and_at_the_end(bench, tmp_path):
    seen: list[Progress] = []

    def report(progress: Progress, written: Path | None) -> Decision:
        seen.append(progress)
        return Decision.CONTINUE

    spec = bench.spec(tokens=10 * BATCH_TOKENS, report_every_tokens=4 * BATCH_TOKENS)
    measured = train(spec, report, cache=bench.cache, output=tmp_path)
    assert [(p.step, p.status) for p in seen] == [(4, "running"), (8, "running"), (10, "done")]
    assert [p.tokens for p in seen] == [p.step * BATCH_TOKENS for p in seen]
    assert measured.curve == tuple(seen)
    assert (measured.status, measured.final) == ("done", seen[-1])


def test_report_covers_the_steps_since_the_last_one(bench, whole, tmp_path):
    sparse = bench.train(bench.spec(report_every_tokens=5 * BATCH_TOKENS), tmp_path)
    each = curve(whole, "train_loss")
    fives = [sum(each[first : first + 5]) / 5 for first in range(0, STEPS, 5)]
    assert curve(sparse, "train_loss") == pytest.approx(fives, rel=1e-6)
    assert curve(sparse, "val_loss") == curve(whole, "val_loss")[4::5]


def test_unfinished_steps_are_rounded_up(bench, tmp_path):
    measured = bench.train(bench.spec(tokens=BATCH_TOKENS + 1), tmp_path)
    assert (measured.final.step, measured.final.tokens) == (2, 2 * BATCH_TOKENS)


def test_first_step_of_a_process_is_not_timed(bench, whole, tmp_path):
    """It pays for set-up; a first report of one step has no rate then, also after a resume."""
    assert curve(whole, "tokens_per_s")[0] is None
    assert all(rate > 0 for rate in curve(whole, "tokens_per_s")[1:])
    first = bench.train(bench.spec(), tmp_path, stop_at=3)
    second = bench.train(bench.spec(), tmp_path, resume_from=Path(first.checkpoint), stop_at=5)
    assert [rate is None for rate in curve(second, "tokens_per_s")] == [1, 0, 0, 1, 0]


def test_mfu_is_absent_where_no_peak_is_known(whole):
    assert set(curve(whole, "mfu")) == {None}
    assert whole.final.mfu_formula == "6N+attn"


def test_mfu_is_the_formula_over_the_peak(bench):
    spec = bench.spec(system={"gpu": "A100-80GB"})
    share = flops_per_token(spec.model, 32) * 1000.0 / 312e12  # 312 TFLOP/s by its data sheet
    assert flops_utilisation(spec, 1000.0) == pytest.approx(share)
    assert flops_utilisation(spec, None) is None


def test_peak_memory_on_cpu_is_what_the_process_holds(whole):
    assert 0.1 < whole.final.peak_mem_gb < 10


def test_schedule_shows_in_the_reports(whole):
    """wsd of 20 steps: warm-up ends within the first, the last 4 decay, half of that in 2."""
    assert [p.step for p in whole.curve if p.warming_up] == []
    assert [p.step for p in whole.curve if p.decayed] == [18, 19, 20]


def test_validation_reads_the_same_tokens_whatever_the_micro_batch(bench, tmp_path):
    by_size = [
        bench.train(
            bench.spec(system={"micro_batch": size}, tokens=BATCH_TOKENS), tmp_path / str(size)
        )
        for size in (1, 2, 8)
    ]
    assert [m.final.val_loss for m in by_size] == pytest.approx([by_size[0].final.val_loss] * 3)
    assert [m.final.train_loss for m in by_size] == pytest.approx([by_size[0].final.train_loss] * 3)


def test_bits_per_byte_is_the_loss_over_the_bytes(whole, bench):
    per_token = build(bench.spec().data, bench.cache).bytes_per_token("validation")
    expected = whole.final.val_loss / math.log(2) / per_token
    assert whole.final.val_bits_per_byte == pytest.approx(expected)
    assert 1 < per_token < 8


@pytest.mark.parametrize("strategy", ["ddp", "fsdp_full", "zero3"])
def test_one_worker_trains_as_single_whatever_the_strategy(strategy, bench, whole, tmp_path):
    system = {"strategy": strategy, "n_gpus": 1}
    measured = bench.train(bench.spec(system=system), tmp_path, stop_at=3)
    assert curve(measured, "val_loss") == curve(whole, "val_loss")[:3]


def test_checkpoints_come_at_their_interval_and_at_the_end(bench, tmp_path):
    """Written in the background: heard of at the report where they are due, or later."""
    written: list[tuple[int, str]] = []

    def report(progress: Progress, checkpoint: Path | None) -> Decision:
        if checkpoint is not None:
            written.append((progress.step, checkpoint.name))
        if progress.step in (8, 16):  # a loaded disk may take longer than the steps that are left
            due, until = tmp_path / f"step_{progress.step:08d}", time.monotonic() + 60
            while not due.exists() and time.monotonic() < until:
                time.sleep(0.01)
        return Decision.CONTINUE

    spec = bench.spec(checkpoint_every_tokens=8 * BATCH_TOKENS)
    measured = train(spec, report, cache=bench.cache, output=tmp_path)
    names = [name for _, name in written]
    assert names == ["step_00000008", "step_00000016", "step_00000020"]
    assert all(int(name.removeprefix("step_")) <= step for step, name in written)
    assert written[-1][0] == 20  # the last one is waited for
    assert measured.checkpoint == str(tmp_path / "step_00000020")


def test_without_an_interval_there_is_one_checkpoint_at_the_end(whole):
    folder = Path(whole.checkpoint).parent
    assert [path.name for path in folder.iterdir()] == ["step_00000020"]


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(bench, whole, tmp_path):
    first = bench.train(bench.spec(), tmp_path, stop_at=7)
    assert (first.status, first.final.step) == ("stopped", 7)
    second = bench.train(bench.spec(), tmp_path, resume_from=Path(first.checkpoint))
    assert second.status == "done"
    assert losses(second) == losses(whole)
    assert curve(second, "grad_norm") == curve(whole, "grad_norm")


def test_checkpoint_interval_goes_on_after_a_resume(bench, tmp_path):
    spec = bench.spec(checkpoint_every_tokens=8 * BATCH_TOKENS, tokens=16 * BATCH_TOKENS)
    first = bench.train(spec, tmp_path, stop_at=8)
    middle = Path(first.checkpoint)
    assert bench.train(spec, tmp_path, resume_from=middle, stop_at=12).checkpoint is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000008", "step_00000012"]


def test_stop_where_a_checkpoint_was_just_written_does_not_write_it_again(
    bench, tmp_path, monkeypatch
):
    states: list[int] = []
    state_of = TorchEngine.state

    def counted(engine: TorchEngine) -> dict[str, Any]:
        states.append(1)
        return state_of(engine)

    monkeypatch.setattr(TorchEngine, "state", counted)
    spec = bench.spec(checkpoint_every_tokens=2 * BATCH_TOKENS)
    measured = bench.train(spec, tmp_path, stop_at=4)
    assert (measured.status, Path(measured.checkpoint).name) == ("stopped", "step_00000004")
    assert len(states) == 2


def test_finished_run_is_reported_again_and_not_trained_again(bench, whole, tmp_path):
    seen: list[Progress] = []

    def report(progress: Progress, checkpoint: Path | None) -> Decision:
        seen.append(progress)
        return Decision.CONTINUE

    folder = Path(whole.checkpoint)
    again = train(bench.spec(), report, cache=bench.cache, output=tmp_path, resume_from=folder)
    assert again.earlier_seconds > 0
    first = again.model_copy(update={"earlier_seconds": 0.0, "earlier_usd": 0.0})
    assert first == whole  # to the last digit of its rates, which no second training gives
    assert tuple(seen) == whole.curve
    assert list(tmp_path.iterdir()) == []


def test_resumed_run_reports_what_came_before_and_may_be_stopped_there(bench, tmp_path):
    first = bench.train(bench.spec(), tmp_path, stop_at=4)
    steps: list[int] = []

    def report(progress: Progress, checkpoint: Path | None) -> Decision:
        steps.append(progress.step)
        return Decision.STOP if progress.step == 2 else Decision.CONTINUE

    folder = Path(first.checkpoint)
    second = train(bench.spec(), report, cache=bench.cache, output=tmp_path, resume_from=folder)
    assert steps == [1, 2, 3, 4]
    assert (second.status, second.final.step) == ("stopped", 4)
    assert second.checkpoint == first.checkpoint


@pytest.mark.parametrize("lr", [1e2, 1e3, 1e15, 1e30])
def test_divergence_is_a_result(lr, bench, tmp_path):
    """From a loss far above its best to one that is not finite."""
    measured = bench.train(bench.spec(optim={"lr": lr, "warmup_fraction": 0.0}), tmp_path)
    assert measured.status == "diverged"
    assert measured.final.step < STEPS
    assert measured.final.val_loss is None
    assert measured.final.detail
    assert all(math.isfinite(x) for x in losses(measured) if x is not None)
    assert measured.checkpoint is None


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives losses that are not numbers at the forward passes named, counted in training alone."""

    def at(*passes: int) -> None:
        plain, seen = TorchEngine.loss, itertools.count(1)

        def loss(self: TorchEngine, batch: torch.Tensor) -> torch.Tensor:
            found = plain(self, batch)
            return found * math.nan if torch.is_grad_enabled() and next(seen) in passes else found

        monkeypatch.setattr(TorchEngine, "loss", loss)

    return at


@pytest.mark.parametrize("report_steps", [1, 5])
def test_one_gradient_that_is_not_finite_is_skipped_and_told(report_steps, bench, tmp_path, spoil):
    spoil(2 * 7)  # a step has two passes
    run = bench.spec(report_every_tokens=report_steps * BATCH_TOKENS)
    measured = bench.train(run, tmp_path)
    assert measured.status == "done"
    told = [report.step for report in measured.curve if report.skipped_steps]
    assert told == [7 if report_steps == 1 else 10]
    assert sum(report.skipped_steps for report in measured.curve) == 1
    without = [report.train_loss is None for report in measured.curve]
    assert sum(without) == (1 if report_steps == 1 else 0)
    assert measured.final.val_loss < measured.curve[0].val_loss - 0.5


def test_gradients_that_stay_not_finite_end_the_run_and_keep_its_weights(bench, tmp_path, spoil):
    spoil(*range(2 * 6 + 1, 100))
    run = bench.spec(report_every_tokens=5 * BATCH_TOKENS)
    measured = bench.train(run, tmp_path)
    assert (measured.status, measured.final.step) == ("diverged", 6 + SKIPS_IN_A_ROW)
    assert measured.final.detail == "3 steps in a row had gradients that are not finite"
    assert measured.final.skipped_steps == SKIPS_IN_A_ROW
    assert measured.final.train_loss is not None  # of the sixth step


def test_divergence_keeps_the_curve_before_it(bench, tmp_path):
    slow = {"lr": 1e3, "schedule": "wsd", "warmup_fraction": 0.9, "decay_fraction": 0.1}
    measured = bench.train(bench.spec(optim=slow), tmp_path)
    assert measured.status == "diverged"
    *before, _ = measured.curve
    assert before
    assert all(report.status == "running" and report.val_loss is not None for report in before)


def test_divergence_inside_the_first_interval_is_seen(bench, tmp_path):
    """No report to compare with yet: the untrained model's loss stands in."""
    wild = bench.spec(
        optim={"lr": 1e3, "warmup_fraction": 0.0}, report_every_tokens=STEPS * BATCH_TOKENS
    )
    measured = bench.train(wild, tmp_path)
    assert len(measured.curve) == 1
    assert measured.status == "diverged"


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(caught.value)


def refused(bench: Any, spec: RunSpec, output: Path, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        bench.train(spec, output, **more)
    assert not list(output.iterdir())
    return str(caught.value)


def test_wrong_number_of_processes_is_refused(bench, tmp_path):
    message = refused(bench, bench.spec(system={"n_gpus": 2, "strategy": "ddp"}), tmp_path)
    assert "n_gpus is 2 but 1 process" in message
    assert "torchrun --nproc-per-node 2" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
def test_gpu_without_cuda_is_refused(bench, tmp_path):
    message = refused(bench, bench.spec(system={"gpu": "H100-80GB"}), tmp_path)
    assert re.search(r"H100-80GB.*no CUDA.*gpu: cpu", message)


def test_unknown_gpu_is_refused_with_the_nearest(bench, tmp_path):
    message = refused(bench, bench.spec(system={"gpu": "H100-08GB"}), tmp_path)
    assert "did you mean 'H100-80GB'" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it can run")
def test_kernel_that_cannot_run_is_bad_input_before_the_corpus_is_read(bench, tmp_path):
    spec = bench.spec(system={"attention": "fa3"}, data={"corpus": "not there"})
    message = refused(bench, spec, tmp_path)
    assert message.startswith("system.attention: attention kernel fa3 cannot run on cpu")
    assert message.endswith("what can run there: math, flash")


def test_checkpoint_of_another_recipe_is_refused(bench, whole, tmp_path):
    message = refused(bench, bench.spec(seed=5), tmp_path, resume_from=Path(whole.checkpoint))
    assert "another run" in message
    message = refused(
        bench, bench.spec(tokens=BATCH_TOKENS), tmp_path, resume_from=Path(whole.checkpoint)
    )
    assert "over 5120 tokens" in message


def test_folder_that_is_no_checkpoint_is_refused(bench, tmp_path):
    (tmp_path / "output").mkdir()
    message = refused(bench, bench.spec(), tmp_path / "output", resume_from=tmp_path)
    assert "is not a checkpoint" in message


def test_corpus_shorter_than_a_sequence_is_refused(bench, tmp_path):
    data = {"seq_len": 4096}
    spec = bench.spec(data=data, optim={"batch_tokens": 4096}, system={"micro_batch": 1})
    assert "too short" in refused(bench, spec, tmp_path)


def test_missing_corpus_is_refused(bench, tmp_path):
    spec = bench.spec(data={"corpus": str(tmp_path / "none.jsonl")})
    assert "none.jsonl" in refused(bench, spec, tmp_path)


def test_vocabulary_smaller_than_bpe_is_refused(bench):
    with pytest.raises(ValidationError, match=r"model\.vocab must hold the tokenizer: 299"):
        bench.spec(model={"vocab": 299})


def test_vocabulary_smaller_than_a_tokenizer_file_is_refused(bench, tmp_path):
    path, output = tmp_path / "tokenizer.json", tmp_path / "output"
    output.mkdir()
    text = " ".join(f"word{number}" for number in range(400))
    path.write_text(make_tokenizer(bench.spec().data, [text]).to_str())
    spec = bench.spec(data={"tokenizer": str(path)}, model={"vocab": 280})
    assert "model.vocab must hold the tokenizer: 280 is below" in refused(bench, spec, output)
