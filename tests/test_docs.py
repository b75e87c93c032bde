"""What the READMEs show runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def blocks(file: str, language: str) -> list[str]:
    text = (ROOT / file).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_models_example_runs():
    (code,) = blocks("models/README.md", "python")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_space_of_the_readme_is_the_quickstart():
    (shown,) = blocks("README.md", "yaml")
    shipped = yaml.safe_load((ROOT / "search_spaces/quickstart.yaml").read_text())["space"]
    for section, fields in yaml.safe_load(shown)["space"].items():
        assert {name: shipped[section][name] for name in fields} == fields


@pytest.mark.parametrize("command", ["models", "gpus", "spaces", "search quickstart --dry-run"])
def test_commands_of_the_readme_answer(command):
    done = subprocess.run(
        [sys.executable, "-m", "thriftlm", *command.split(), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
