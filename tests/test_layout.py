"""The repository's shape, which packaging and Ray jobs depend on."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "deploy",
    "models",
    "platform",
    "pyproject.toml",
    "requirements.lock",
    "search_spaces",
    "tests",
}
LONGEST_FILE = 450


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [Path(line) for line in listed.stdout.splitlines()]


def python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_top_level_is_what_the_readme_says():
    found = {path.parts[0] for path in tracked() if not path.parts[0].startswith(".")}
    assert found == TOP_LEVEL


@pytest.mark.parametrize("root", ["platform", "models"])
def test_source_roots_are_no_packages(root):
    assert not (ROOT / root / "__init__.py").exists()


def test_standard_library_platform_is_not_shadowed_from_the_root():
    assert python("import platform; print(platform.system())") in {"Linux", "Darwin", "Windows"}


def test_planning_and_specs_load_neither_torch_nor_ray_nor_mlflow():
    heavy = python(
        "import sys, thriftlm.planning.law, thriftlm.planning.scaling_laws, "
        "thriftlm.planning.estimate, thriftlm.planning.calibration, thriftlm.spec, "
        "thriftlm.catalog, thriftlm.prices, thriftlm_models.config; "
        "print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    )
    assert heavy == "set()"


def test_training_loads_neither_ray_nor_mlflow():
    heavy = python(
        "import sys, thriftlm.training.loop; print({'ray', 'mlflow'} & set(sys.modules))"
    )
    assert heavy == "set()"


def test_runtime_env_puts_both_roots_on_the_path_and_leaves_bulk_behind():
    env = yaml.safe_load((ROOT / "deploy/runtime_env.yaml").read_text())
    assert env["env_vars"]["PYTHONPATH"] == "platform:models"
    assert {".git", ".venv"} <= set(env["excludes"])


def test_lock_pins_exactly_and_names_no_registry():
    lines = (ROOT / "requirements.lock").read_text().split()
    assert all("==" in line for line in lines)
    assert not [line for line in lines if "+cpu" in line or "://" in line]
    assert "torch==2.13.0" in lines


def test_files_stay_readable():
    lengths = {
        path: len((ROOT / path).read_text().splitlines())
        for path in tracked()
        if path.suffix == ".py"
    }
    assert {path: n for path, n in lengths.items() if n > LONGEST_FILE} == {}


def test_ci_runs_exactly_make_test():
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert script[-1] == "exec make test"
