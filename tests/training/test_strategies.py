"""Every strategy on two processes against the single process, over one pair of processes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from thriftlm.spec import Measurement, RunSpec
from thriftlm.training.checkpoint import load_decoder
from thriftlm.training.divergence import SKIPS_IN_A_ROW
from thriftlm_models.counts import applied_params, stored_params

TORCH = ("ddp", "fsdp_full", "fsdp_grad_op", "hsdp")
ZERO = ("zero1", "zero2", "zero3")
STRATEGIES = TORCH + ZERO
LOSS_TOLERANCE = 1e-5
BF16_TOLERANCE = 0.01
"""bf16 keeps 8 bits, a relative error of 0.4% in each product; measured here: 0.002 nats."""
MIDDLE = random.randrange(1, 20)
"""Step at which a run stops and goes on: at random, and the same for all tests of a session."""
CHANGES = (
    ("ddp", "fsdp_full"), ("fsdp_full", "zero1"), ("zero1", "zero2"),
    ("zero2", "zero3"), ("zero3", "fsdp_grad_op"), ("fsdp_grad_op", "ddp"), ("single", "zero3"),
)  # fmt: skip
HUGE_BATCH = 8192

STEPS = 20
SHORT = {"tokens": 5 * 256}
RICH = {
    "n_layers": 3, "attention_pattern": ["sliding", "none", "full"], "window": 8,
    "rope_pattern": [1e4, 0.0, 1e6], "qk_norm": "learned", "post_norm": True, "bias": True,
    "activation": "geglu", "scale_embedding": True, "init": "tinyllama",
    "parametrization": "mup", "mup_base_width": 16,
}  # fmt: skip
"""What no run above has; under muP the optimizer has groups with rates of their own."""
PACKED = {"packing": "best_fit", "document_mask": True}
WIDE = {"d_model": 336, "d_ff": 672, "n_layers": 1}
PAIR = {"n_gpus": 2, "micro_batch": 2}
BF16 = {"precision": "amp_bf16"}
KINDS: dict[str, dict[str, Any]] = {
    "fsdp_full+offload": {"system": {"strategy": "fsdp_full", "cpu_offload": True}},
    "zero2+offload": {"system": {"strategy": "zero2", "cpu_offload": True}},
    "zero3+offload": {"system": {"strategy": "zero3", "cpu_offload": True}},
    "ddp+muon": {"system": {"strategy": "ddp"}, "optim": {"optimizer": "muon"}},
    "hsdp+muon": {"system": {"strategy": "hsdp"}, "optim": {"optimizer": "muon"}},
    "fsdp_full+bf16": {"system": {"strategy": "fsdp_full", "precision": "bf16_true"}},
    "zero1+bf16": {"system": {"strategy": "zero1", "precision": "bf16_true"}},
}
"""Other kinds of state that a checkpoint has to hold: in host memory, of Muon, without masters."""


def job(name: str, run: RunSpec, bench: Any, **more: Any) -> dict[str, Any]:
    fields = {"name": name, "run": run.model_dump(mode="json"), "cache": str(bench.cache)}
    return fields | {"stop_at": None, "resume_from": None} | more


def middle(folder: Path, strategy: str) -> str:
    """The checkpoint that a strategy's first part ends with."""
    return str(folder / f"first/{strategy}/step_{MIDDLE:08d}")


def jobs(bench: Any, folder: Path, single_checkpoint: str) -> list[dict[str, Any]]:
    """What the pair does; a strategy's jobs follow each other, the broken one comes last."""
    listed = []
    for strategy in STRATEGIES:
        system = PAIR | {"strategy": strategy}
        run = bench.spec(system=system)
        short = bench.spec(system=system | BF16, **SHORT)
        wild = bench.spec(system=system, optim={"lr": 1e30, "warmup_fraction": 0.0})
        free = bench.spec(system=system, optim={"grad_clip": 0.0})
        rich = bench.spec(system=system, model=RICH, **SHORT)
        packed = bench.spec(system=system, data=PACKED, **SHORT)
        listed += [
            job(f"whole/{strategy}", run, bench),
            job(f"rich/{strategy}", rich, bench),
            job(f"packed/{strategy}", packed, bench),
            job(f"bf16/{strategy}", short, bench),
            job(f"wild/{strategy}", wild, bench),
        ]
        if strategy in ZERO:
            listed.append(job(f"unclipped/{strategy}", free, bench))
        listed += [
            job(f"first/{strategy}", run, bench, stop_at=MIDDLE),
            job(f"second/{strategy}", run, bench, resume_from=middle(folder, strategy)),
        ]
    for kind, sections in KINDS.items():
        run = bench.spec(**sections | {"system": PAIR | sections["system"]})
        listed += [
            job(f"whole/{kind}", run, bench),
            job(f"first/{kind}", run, bench, stop_at=MIDDLE),
            job(f"second/{kind}", run, bench, resume_from=middle(folder, kind)),
        ]
    # Each goes on from the middle of another one's run, in the next's layout.
    listed += [
        job(
            f"from_{before}/{strategy}",
            bench.spec(system=PAIR | {"strategy": strategy}),
            bench,
            resume_from=single_checkpoint if before == "single" else middle(folder, before),
        )
        for before, strategy in CHANGES
    ]
    wide = bench.spec(system=PAIR | {"strategy": "zero3"}, model=WIDE, **SHORT)
    large = {"strategy": "ddp", "n_gpus": 2, "micro_batch": HUGE_BATCH}
    tokens = 2 * HUGE_BATCH * 32
    huge = bench.spec(system=large, optim={"batch_tokens": tokens}, tokens=tokens)
    return [
        *listed,
        job("wide/zero3", wide, bench),
        job("huge/ddp", huge, bench),
    ]


@pytest.fixture(scope="module")
def single(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measurement]:
    """The single process's measurements by name."""
    folder = tmp_path_factory.mktemp("single")
    short = bench.spec(**SHORT)
    runs = {
        "whole": bench.spec(),
        "unclipped": bench.spec(optim={"grad_clip": 0.0}),
        "clipped_at_1": bench.spec(optim={"grad_clip": 1.0}),
        "short": short,
        "wide": bench.spec(model=WIDE, **SHORT),
        "rich": bench.spec(model=RICH, **SHORT),
        "packed": bench.spec(data=PACKED, **SHORT),
        "bf16": short.model_copy(update={"system": short.system.model_copy(update=BF16)}),
    }
    found = {name: bench.train(run, folder / name) for name, run in runs.items()}
    return found | {"first": bench.train(bench.spec(), folder / "first", stop_at=MIDDLE)}


@pytest.fixture(scope="module")
def folder(
    bench: Any, single: dict[str, Measurement], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Where the pair has done all its jobs."""
    folder = tmp_path_factory.mktemp("pair")
    first = single["first"].checkpoint
    assert first is not None
    (folder / "jobs.json").write_text(json.dumps(jobs(bench, folder, first)))
    command = [sys.executable, str(Path(__file__).with_name("two_ranks.py")), str(folder)]
    ranks = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        with (folder / f"log_{rank}").open("w") as log:
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(600) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0], "\n".join((folder / f"log_{rank}").read_text() for rank in range(2))
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> dict[str, Measurement]:
    """The pair's measurements by name of the job."""
    found = json.loads((folder / "results.json").read_text())
    return {name: Measurement.model_validate(fields) for name, fields in found.items()}


def assert_same_curve(found: Measurement, expected: Measurement, tolerance: float) -> None:
    assert found.status == expected.status
    assert [p.step for p in found.curve] == [p.step for p in expected.curve]
    assert values(found, "train_loss") == approx(values(expected, "train_loss"), tolerance)
    assert values(found, "val_loss") == approx(values(expected, "val_loss"), tolerance)
    expected_norms = pytest.approx(values(expected, "grad_norm"), rel=10 * tolerance)
    assert values(found, "grad_norm") == expected_norms


def approx(expected: list[float], tolerance: float) -> Any:
    return pytest.approx(expected, abs=tolerance, rel=0)


def values(measured: Measurement, field: str) -> list[float]:
    return [getattr(report, field) for report in measured.curve]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_are_those_of_the_single_process(strategy, pair, single, bench):
    assert bench.spec().grad_accum == bench.spec(system=PAIR | {"strategy": "ddp"}).grad_accum == 2
    assert len(pair[f"whole/{strategy}"].curve) == STEPS
    assert (
        max(values(single["whole"], "grad_norm")) > bench.spec().optim.grad_clip > 0
    )  # clipping acts
    assert_same_curve(pair[f"whole/{strategy}"], single["whole"], LOSS_TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_kind_of_block_trains_alike_under_mup_too(strategy, pair, single):
    assert_same_curve(pair[f"rich/{strategy}"], single["rich"], LOSS_TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_documents_give_the_losses_of_the_single_process(strategy, pair, single):
    """Padding differs by micro-batch, and the mean is still that over all real targets."""
    assert_same_curve(pair[f"packed/{strategy}"], single["packed"], LOSS_TOLERANCE)
    assert values(single["packed"], "train_loss") != values(single["short"], "train_loss")


@pytest.mark.parametrize("strategy", ZERO)
def test_clipping_is_off_when_it_is_off(strategy, pair, single):
    """DeepSpeed's own default clips at 1.0 in silence: the norms here pass that and it shows."""
    off, at_1 = single["unclipped"], single["clipped_at_1"]
    assert max(values(off, "grad_norm")) > 1.0
    assert abs(off.curve[-1].val_loss - at_1.curve[-1].val_loss) > 100 * LOSS_TOLERANCE
    assert_same_curve(pair[f"unclipped/{strategy}"], off, LOSS_TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_stays_near_fp32(strategy, pair, single):
    found, exact = pair[f"bf16/{strategy}"], single["short"]
    assert_same_curve(found, exact, BF16_TOLERANCE)
    assert found.curve[-1].train_loss != exact.curve[-1].train_loss


def test_bf16_gradients_are_reduced_in_fp32(pair):
    """DeepSpeed's default reduces those of linear layers in bf16; then this differs by 0.001."""
    assert_same_curve(pair["bf16/zero1"], pair["bf16/ddp"], LOSS_TOLERANCE)


def test_parameters_large_enough_for_zero3_to_release(pair, single):
    """DeepSpeed keeps tensors below 100,000 elements whole, those of the tiny model all."""
    assert_same_curve(pair["wide/zero3"], single["wide"], LOSS_TOLERANCE)


def test_bf16_of_one_process_stays_near_fp32(single):
    assert_same_curve(single["bf16"], single["short"], BF16_TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_divergence_is_a_result(strategy, pair):
    found = pair[f"wild/{strategy}"]
    assert (found.status, found.final.step) == ("diverged", 1 + SKIPS_IN_A_ROW)
    assert [report.status for report in found.curve[:-1]] == ["running"] * SKIPS_IN_A_ROW
    assert found.final.grad_norm is found.final.val_loss is None


@pytest.mark.parametrize("strategy", [*STRATEGIES, *KINDS])
def test_resumed_run_goes_on_as_if_it_had_not_stopped(strategy, pair):
    """The first part was stopped by the second rank alone, which is enough."""
    first, second, whole = (pair[f"{part}/{strategy}"] for part in ("first", "second", "whole"))
    assert (first.status, first.final.step) == ("stopped", MIDDLE)
    assert_same_curve(second, whole, 0.0)


@pytest.mark.parametrize(("before", "strategy"), CHANGES)
def test_checkpoint_of_one_strategy_goes_on_with_another(before, strategy, pair, single):
    assert_same_curve(pair[f"from_{before}/{strategy}"], single["whole"], LOSS_TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoint_of_two_ranks_goes_on_in_one_process(
    strategy, pair, folder, single, bench, tmp_path
):
    found = bench.train(bench.spec(), tmp_path, resume_from=middle(folder, strategy))
    assert_same_curve(found, single["whole"], LOSS_TOLERANCE)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("job", ["whole", "rich"])
def test_the_model_of_a_checkpoint_opens_whole_in_one_process(strategy, job, pair, single):
    opened, state = load_decoder(Path(pair[f"{job}/{strategy}"].checkpoint))
    expected, _ = load_decoder(Path(single[job].checkpoint))
    assert state.run.system.strategy == strategy
    assert opened.state_dict().keys() == expected.state_dict().keys()
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        logits, wanted = opened(tokens), expected(tokens)
    assert wanted.std() > 0.01
    assert (logits - wanted).abs().max() < 1e-3 * wanted.std()


def tensors_in_checkpoint(folder: Path, prefix: str) -> dict[str, int]:
    listed = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name: entry.size.numel()
        for name, entry in listed.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
def test_checkpoint_holds_each_shared_block_once(strategy, pair, single, bench):
    model = bench.spec().model
    assert applied_params(model) > stored_params(model)
    measured = single["whole"] if strategy == "single" else pair[f"whole/{strategy}"]
    folder = Path(measured.checkpoint)
    assert sum(tensors_in_checkpoint(folder, "model.").values()) == stored_params(model)
    moments = tensors_in_checkpoint(folder, "optimizer.state.")
    averages = sum(count for name, count in moments.items() if name.endswith("exp_avg"))
    assert averages == stored_params(model)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_rank_writes_its_share(strategy, pair):
    """What a rank holds whole is written by one of the two, about half by each."""
    folder = Path(pair[f"whole/{strategy}"].checkpoint)
    sizes = [(folder / f"__{rank}_0.distcp").stat().st_size for rank in range(2)]
    assert max(sizes) < 2 * min(sizes)


def test_rank_that_runs_out_of_memory_says_so_and_its_peer_does_not(folder):
    peer, short = (json.loads((folder / f"oom_{rank}.json").read_text()) for rank in range(2))
    assert short["type"] == "OutOfMemoryOnOneRankError"
    assert short["message"].startswith("out of memory on rank 1: ")
    assert peer["type"] != "OutOfMemoryOnOneRankError"


def test_ddp_reduces_once_in_a_step(folder):
    after_first, after_last = json.loads((folder / "reductions.json").read_text())
    assert after_first == 0
    assert after_last >= 1


def test_nothing_is_printed(folder):
    """A library's warnings and banners would stand between the lines of a run's progress."""
    assert (folder / "log_0").read_text() == (folder / "log_1").read_text() == ""
