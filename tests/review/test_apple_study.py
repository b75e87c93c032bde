"""Apple's study (arXiv 2410.19456) drawn and compared: data, figures, page, command.

What the estimates get right and wrong is tested in tests/planning/test_apple_study.py.
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from thriftlm.review import apple_pictures, pictures
from thriftlm.review.apple_comparison import compare
from thriftlm.review.apple_report import paragraph, report, table
from thriftlm.review.apple_study import FIGURES, GPUS, MODELS, SPACE, STRATEGIES, published, studies
from thriftlm.review.space_estimates import estimate_space
from thriftlm.search.spaces.space import load_space

PRICES = {"A100-40GB": 1.0, "A100-80GB": 1.46, "H100-80GB": 2.53}  # Table 1, average used


@pytest.fixture(scope="module")
def estimated():
    return estimate_space(load_space(SPACE), ["eager", "fused"])


@pytest.fixture(scope="module")
def eager(estimated):
    return studies(estimated)[0]


@pytest.fixture(scope="module")
def rows(estimated):
    """What `--json` says of the eager stack, with the fields that the figures add."""
    found = [row for row in estimated.rows() if row["stack"] == "eager"]
    for row in found:
        row["batch"] = row["global_batch_tokens"] // 1024
        row["nodes"] = -(-row["n_gpus"] // 8)
        row["value"] = row["fits"] * row["tokens_per_s_per_gpu"] / PRICES[row["gpu"]]
    return found


# --- the published points -----------------------------------------------------------------------


def test_every_point_of_the_four_figures_is_there():
    series = {figure.number: published(figure.number) for figure in FIGURES}
    assert [sum(map(len, found.values())) for found in series.values()] == [56, 84, 48, 96]
    for figure in FIGURES:
        assert list(series[figure.number]) == [(m, name) for m in MODELS for name in figure.names]
        for marks in series[figure.number].values():
            assert [mark.x for mark in marks] == [marks[0].x * 2**i for i in range(len(marks))]
            assert all(mark.low <= mark.value <= mark.high for mark in marks)
    out = [key for found in series.values() for key, marks in found.items() if not marks[-1].value]
    assert out == [("apple-1b", "math"), ("apple-2b", "math"), ("apple-2b", "ddp")]
    every = [mark for found in series.values() for marks in found.values() for mark in marks]
    assert sum(mark.value == 0 for mark in every) == 3


def test_the_figures_agree_with_each_other():
    # The best of Figure 3 on 2, 4 and 8 nodes is Figure 2's A100-80GB on 16, 32 and 64 GPUs.
    for model in MODELS:
        eighty = {mark.x: mark.value for mark in published(2)[model, "A100-80GB"]}
        for i, nodes in enumerate((1, 2, 4, 8)):
            best = max(published(3)[model, name][i].value for name in STRATEGIES)
            counts = (2, 4, 8) if nodes == 1 else (8 * nodes,)
            assert best == max(eighty[n] for n in counts)


# --- the estimated ones -------------------------------------------------------------------------


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"figure {figure.number}")
def test_a_mark_is_the_best_over_all_that_is_not_shown(figure, rows, eager):
    marks = eager.figure(figure)
    assert marks.keys() == published(figure.number).keys()
    for (model, name), found in marks.items():
        for mark in (found[0], found[-1]):
            shown = {"model": model, figure.series: name, figure.x: mark.x, **figure.fixed}
            values = [row["value"] for row in rows if shown.items() <= row.items()]
            assert len(values) > 1
            assert mark.value == pytest.approx(max(values))
            assert mark.low <= mark.value <= mark.high


def test_what_does_not_fit_is_zero(eager):
    out = {"model": "apple-2b", "strategy": "ddp", "batch": 1024}
    assert not eager.runs(**out)
    assert eager.figure(FIGURES[3])["apple-2b", "ddp"][-1].value == 0
    with pytest.raises(ValueError, match="no run of the study"):
        eager.best(model="apple-3b")


# --- the comparison -----------------------------------------------------------------------------


def test_the_papers_side_is_what_the_paper_found(eager):
    found = compare(eager)
    gains = [round(gain.published, 2) for gain in found.flash_gains]
    assert gains == [3.32, 2.17, 2.08, 1.61]
    best = {(b.model, b.strategy): b.published for b in found.best_batches}
    assert [best[model, "ddp"] for model in MODELS] == [128, 32, 16, 8]
    assert best["apple-100m", "fsdp_full"] == 64
    winners = [cell.published for cell in found.several]
    assert (len(winners), winners.count("A100-40GB"), winners.count("A100-80GB")) == (24, 19, 5)
    several = [cell for cell in found.shardings if cell.nodes > 1]
    for cell in several:
        ahead = max(cell.published, key=cell.published.__getitem__)
        assert (ahead == "ddp") == (cell.model != "apple-2b")
    assert all(speed.h100_published < 1 for speed in found.speeds)


def test_every_estimated_number_follows_from_the_figures(eager):
    found = compare(eager)
    for cell in found.cells:
        values = {
            gpu: eager.best(model=cell.model, n_gpus=cell.n_gpus, gpu=gpu).value for gpu in GPUS
        }
        assert cell.estimated == max(GPUS, key=values.__getitem__)
        assert (cell.h100 > 1) == (cell.estimated == "H100-80GB")
        assert cell.h100_at_80gb == pytest.approx(values["H100-80GB"] / values["A100-80GB"])
        assert (cell.kept == 1) == (cell.estimated == cell.published)
    assert found.right == sum(c.estimated in ("A100-40GB", c.published) for c in found.several)
    fit = found.fit
    assert fit.points == 284
    out = [len(fit.out_in_both) + len(fit.out_published_only), fit.compared]
    assert out == [3, 284 - 6 - 3 - len(fit.out_estimated_only)]  # six outliers
    assert 0 <= fit.inside <= fit.compared


def test_acceptance_of_the_eager_replay(eager):
    found = compare(eager)
    gains = [gain.same_configuration for gain in found.flash_gains]
    assert gains == sorted(gains, reverse=True)
    assert found.right >= 19
    assert all(best.largest < 1 for best in found.best_batches)


def test_a_fused_stack_puts_h100_ahead_of_the_card_of_its_memory(estimated):
    eager, fused = map(compare, studies(estimated))
    assert fused.stack == "fused"
    assert all(cell.h100_at_80gb > 1.1 for cell in fused.cells)
    better = zip(fused.speeds, eager.speeds, strict=True)
    assert all(f.h100_estimated > e.h100_estimated for f, e in better)


# --- pictures and page --------------------------------------------------------------------------


def test_a_picture_draws_both_sides_of_every_series(eager):
    figure = FIGURES[1]
    canvas = apple_pictures.picture(eager, figure)
    ours, theirs = eager.figure(figure), published(figure.number)
    for axes, model in zip(canvas.axes, MODELS, strict=True):
        drawn = [list(line.get_ydata()) for line in axes.lines]
        for gpu in GPUS:
            assert [mark.value for mark in ours[model, gpu]] in drawn
            assert [mark.value for mark in theirs[model, gpu]] in drawn
        assert axes.get_ylim()[0] == 0
        assert len(axes.collections) == len(GPUS)  # error bars
    assert "A100-80GB" in apple_pictures.picture(eager, FIGURES[2]).texts[0].get_text()


def test_the_command_draws_four_figures_a_stack_and_tells_how_they_compare(thriftlm, tmp_path):
    options = ("--stack", "eager", "--figures", "new/study")
    code, out, err = thriftlm("estimate", "--space", SPACE, *options)
    assert (code, err) == (0, "")
    page = (tmp_path / "new/study/report.md").read_text()
    assert out.startswith(page)
    command = "thriftlm estimate --space apple_bottlenecks --stack eager --figures new/study"
    assert f"    {command}\n" in page
    names = [f"figure{n}_eager.png" for n in (1, 2, 3, 4)]
    assert out[len(page) :].split() == [f"new/study/{name}" for name in [*names, "report.md"]]
    for name in names:
        pixels = imread(tmp_path / "new/study" / name)[:, :, :3]
        assert pixels.shape[:2] == (1000, 1400)
        for colour in pictures.PALETTE[:2]:
            exact = np.all(np.abs(pixels[::2, ::2] - np.array(to_rgb(colour))) < 0.01, axis=-1)
            assert exact.sum() > 250


def test_json_has_the_estimates_the_comparison_and_the_files(thriftlm):
    options = ("--stack", "fused", "--figures", "study", "--json")
    code, out, err = thriftlm("estimate", "--space", SPACE, *options)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert len(found["estimates"]) == 2280
    (comparison,) = found["comparisons"]
    assert comparison["stack"] == "fused"
    assert len(comparison["cells"]) == 28
    assert {"flash_gains", "shardings", "best_batches", "speeds", "fit", "right"} < set(comparison)
    assert len(found["files"]) == 5


def test_the_page_says_what_was_found(eager, estimated):
    found = compare(eager)
    both = report([compare(study) for study in studies(estimated)], "command")
    assert re.findall("^## Stack (.*)$", both, re.MULTILINE) == ["eager", "fused"]
    page = report([found], "command")
    said = " ".join(page.split())
    assert f"{found.right} of 24 cells" in said
    assert f"{found.fit.inside} of {found.fit.compared} points" in said
    assert "Settled by" in said
    prose = [line for line in page.splitlines() if not line.startswith(("|", "- ", "    "))]
    assert max(map(len, prose)) <= 100


def test_tables_are_padded_and_texts_wrapped():
    assert table(("a", "number"), [["long", "1.5"], ["b", "20"]]) == [
        "| a    | number |",
        "| ---- | -----: |",
        "| long |    1.5 |",
        "| b    |     20 |",
    ]
    assert paragraph("no break-at-hyphens", 10) == ["no", "break-at-hyphens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space", "quickstart", "--figures", "d"], "the 2,280 runs of apple_bottlenecks"),
        (["--space", SPACE, "--set", "space.system.cloud=aws", "--figures", "d"], "lacks 2,280"),
        (["--space", SPACE, "--set", "space.system.n_gpus=[1,2]", "--figures", "d"], "lacks 1,8"),
        (["--space", SPACE, "--figures", "file"], "cannot write file/figure1_thriftlm.png"),
        (["apple-1b", "--gpu", "H100", "--figures", "d"], "--figures go with --space"),
    ],
)
def test_bad_input_is_one_line(arguments, message, thriftlm, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = thriftlm("estimate", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "d").exists()


def test_the_comparison_loads_neither_torch_ray_nor_mlflow():
    code = (
        "import sys, thriftlm.review.apple_report;"
        "print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
