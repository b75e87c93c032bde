"""What the READMEs show runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from thriftlm.config_file import ConfigFile, space_files
from thriftlm.corpora import shares
from thriftlm.prices import usd_per_hour
from thriftlm.spec import DataSpec, RunSpec, SystemSpec
from thriftlm_models.config import ModelSpec

ROOT = Path(__file__).parent.parent


def blocks(file: str, language: str) -> list[str]:
    text = (ROOT / file).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("models/README.md", "python"))
def test_examples_of_the_models_run(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fields_shown_for_the_models_make_a_model():
    (shown,) = blocks("models/README.md", "yaml")
    model = ModelSpec.model_validate(yaml.safe_load(shown)["model"])
    assert model.block_attention[:3] == ("sliding", "sliding", "full")
    assert model.block_rope_base[:3] == (10_000, 10_000, 0)


def test_the_dry_run_shown_for_the_spaces_is_the_one_that_comes():
    (shown,) = blocks("search_spaces/README.md", "console")
    command, *lines = shown.rstrip().splitlines()
    assert lines.pop() == "..."
    done = subprocess.run(
        [sys.executable, "-m", *command.removeprefix("$ ").split()],
        capture_output=True,
        text=True,
        check=True,
    )
    said = [line.rstrip() for line in done.stdout.splitlines()]
    assert said[: len(lines)] == [line.rstrip() for line in lines]


def test_space_of_the_readme_is_the_quickstart():
    shown, _ = blocks("README.md", "yaml")
    shipped = yaml.safe_load((ROOT / "search_spaces/quickstart.yaml").read_text())["space"]
    for section, fields in yaml.safe_load(shown)["space"].items():
        assert {name: shipped[section][name] for name in fields} == fields


def test_data_shown_for_the_platform_are_a_specification():
    shown, _ = blocks("platform/README.md", "yaml")
    data = DataSpec.model_validate(yaml.safe_load(shown)["data"])
    assert [weight for _, weight in shares(data.corpus)] == [0.3, 0.7]
    assert (data.packing, data.document_mask) == ("best_fit", True)


def test_the_long_run_shown_for_the_platform_is_one(tmp_path):
    _, shown = blocks("platform/README.md", "yaml")
    (tmp_path / "run.yaml").write_text(shown)
    run = ConfigFile.read(tmp_path / "run.yaml").parse(RunSpec)
    assert (run.steps, run.grad_accum) == (190_735, 1)
    assert run.tokens / run.steps * 38_147 == pytest.approx(20e9, rel=1e-4)


def test_building_and_verifying_shards_say_what_the_readme_shows(tmp_path):
    (shown,) = blocks("platform/README.md", "console")
    build, *built, verify, _ = shown.rstrip().splitlines()
    environment = os.environ | {"THRIFTLM_STORAGE": str(tmp_path)}

    def said(command):
        done = subprocess.run(
            [sys.executable, "-m", *command.removeprefix("$ ").split()],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return done.stdout.splitlines()

    lines = said(build)
    # What the interpreter's library holds differs from version to version; its names do not.
    assert [line.split("  ")[0] for line in lines] == [line.split("  ")[0] for line in built]
    (folder,) = [line.split()[-1] for line in lines if line.startswith("python-stdlib")]
    (answer,) = said(re.sub(r"~/thriftlm/\S+", folder, verify))
    assert answer.startswith(f"{folder}: whole: 2 files, ")


def test_rates_of_the_readme_price_a_system(tmp_path, monkeypatch):
    _, shown = blocks("README.md", "yaml")
    (tmp_path / "prices.yaml").write_text(shown)
    monkeypatch.setenv("THRIFTLM_PRICES", str(tmp_path / "prices.yaml"))
    ten = SystemSpec(gpu="A100-80GB", n_gpus=10, strategy="ddp", cloud="my-cluster")
    assert usd_per_hour(ten) == pytest.approx(16 * 1.10)
    assert usd_per_hour(SystemSpec(gpu="H100-80GB", n_gpus=1)) == pytest.approx(4.50)


@pytest.mark.parametrize(
    "command",
    [
        "models",
        "gpus",
        "spaces",
        "estimate --space apple_bottlenecks --stack eager --stack fused",
        *(f"search {name} --dry-run" for name in space_files()),
    ],
)
def test_commands_of_the_readme_answer(command):
    done = subprocess.run(
        [sys.executable, "-m", "thriftlm", *command.split(), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_study_shown_in_the_readme_is_the_page_that_was_written():
    page = (ROOT / "tests/benchmarks/results/apple_study.md").read_text()
    (shown,) = [b for b in blocks("README.md", "console") if "--space apple_bottlenecks" in b]
    _, *parts = shown.rstrip().split("\n...")
    quoted = [part.strip() for part in parts if part.strip()]
    assert len(quoted) == 3
    eager = page[page.index("## Stack eager") : page.index("## Stack fused")]
    assert [part for part in quoted if part not in eager] == []


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
