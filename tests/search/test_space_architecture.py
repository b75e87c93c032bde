"""What a space may vary of attention: patterns, scalings, and kernels that the GPU can run."""

import pytest

from thriftlm.spec import InputError

OPTIM = {"lr": 1e-3}


def space(lab, **sections):
    return lab.space(optim=OPTIM, **sections)


def test_kernels_that_a_gpu_cannot_run_are_removed_and_counted(lab):
    system = {
        "gpu": ["cpu", "T4-16GB", "A100-40GB", "H100-80GB"],
        "attention": ["math", "flash", "fa3"],
        "precision": "amp_bf16",
    }
    counts = space(lab, system=system, model={"n_layers": 2}).count()
    # math on all, flash but on T4, fa3 on H100.
    assert counts.valid == 4 + 3 + 1
    assert sum(counts.rejected.values()) == 4
    assert any("fa3 cannot run on cpu" in rule for rule in counts.rejected)
    assert any(
        "flash cannot run on T4-16GB" in rule and "compute capability 8.0 or higher" in rule
        for rule in counts.rejected
    )
    with pytest.raises(InputError, match=r"bf16 alone there: set precision to amp_bf16; what can"):
        space(lab, system={"gpu": "A100-40GB", "attention": "flash"}, model={"n_layers": 2})


def test_patterns_are_values_as_lists_and_choices_as_words(lab):
    found = space(lab, model={"n_layers": 2, "window": 8, "attention_pattern": ["sliding", "full"]})
    (run,) = (found.resolve(point, 0) for point in found.grid())
    assert run.model.attention_pattern == ("sliding", "full")
    words = {"choice": ["full", "sliding full", "none full"]}
    found = space(lab, model={"n_layers": 2, "window": 8, "attention_pattern": words})
    patterns = [found.resolve(point, 0).model.attention_pattern for point in found.grid()]
    assert patterns == [("full",), ("sliding", "full"), ("none", "full")]
    scaling = {"kind": "linear", "factor": 2}
    found = space(lab, model={"n_layers": 2, "rope_scaling": scaling})
    assert found.resolve({}, 0).model.rope_scaling.factor == 2
    with pytest.raises(InputError, match=r"attention_pattern.choice\[1\]: must be 'full'"):
        space(lab, model={"attention_pattern": {"choice": ["full", "ful"]}})
    with pytest.raises(
        InputError, match=r"rope_scaling.kind: must be 'linear' or 'llama3', got 'yarn'"
    ):
        space(lab, model={"rope_scaling": {"kind": "yarn", "factor": 2}})
