"""Which parameters decay and how fast they learn, and that muP does what it is for."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from thriftlm.spec import RunSpec
from thriftlm.training.optimizer import LR_FACTOR, adamw, set_lr
from thriftlm_models.decoder import Decoder

WIDTHS = (64, 128, 256, 512)
STEPS = 4


def run(width: int, parametrization: str = "mup", **model: Any) -> RunSpec:
    shape = {
        "n_layers": 2, "d_model": width, "head_dim": 32, "n_heads": width // 32,
        "d_ff": 2 * width, "vocab": 257, "parametrization": parametrization, "mup_base_width": 64,
    }  # fmt: skip
    return RunSpec.model_validate(
        {"model": shape | model, "data": {"tokenizer": "bpe:257"}, "tokens": 32_768}
    )


def test_matrices_decay_and_vectors_do_not() -> None:
    spec = run(64, "standard", norm="layer", bias=True)
    decoder = Decoder(spec.model)
    groups = adamw(decoder, spec).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decays) == len(list(decoder.parameters()))
    for parameter in decoder.parameters():
        assert decays[id(parameter)] == (spec.optim.weight_decay if parameter.ndim == 2 else 0)


def test_under_mup_rate_times_decay_does_not_depend_on_the_width() -> None:
    for width in WIDTHS:
        spec = run(width)
        optimizer = adamw(Decoder(spec.model), spec)
        set_lr([optimizer], 0.5)
        factors = {group[LR_FACTOR] for group in optimizer.param_groups}
        assert factors == {1.0, 64 / width}
        products = {round(g["lr"] * g["weight_decay"], 9) for g in optimizer.param_groups}
        assert products == {0.0, 0.5 * spec.optim.weight_decay}


def changes(width: int, parametrization: str, model: dict[str, object]) -> dict[str, float]:
    """How far a few steps of Adam move what each part of the model computes: root mean square."""
    heads = {"n_heads": 2, "head_dim": width // 2} if model.get("grow_heads") else {}
    fields = {name: value for name, value in model.items() if name != "grow_heads"}
    spec = run(width, parametrization, **fields, **heads)
    decoder = Decoder(spec.model)
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        def keep(_module: object, _inputs: object, output: Tensor) -> None:
            seen[name] = output.detach()

        decoder.get_submodule(name).register_forward_hook(keep)

    for name in ("blocks.0.attention", "blocks.1.attention", "blocks.1.feed_forward"):
        watch(name)
    tokens = torch.randint(257, (8, 33), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    total: dict[str, float] = {}
    for seed in range(3):
        decoder.init_weights(seed)
        optimizer = adamw(decoder, spec)
        set_lr([optimizer], 4e-3)
        snapshots = []
        for step in range(STEPS + 1):
            with torch.no_grad():
                logits = decoder(inputs)
            if step in (0, STEPS):
                snapshots.append(seen | {"logits": logits})
            torch.autograd.backward(decoder(inputs, targets))
            optimizer.step()
            optimizer.zero_grad()
        before, after = snapshots
        for name in after:
            moved = (after[name] - before[name]).square().mean().sqrt().item()
            total[name] = total.get(name, 0.0) + moved / 3
    return total


@pytest.mark.parametrize(
    "model",
    [
        {"tie_embeddings": True},
        {"tie_embeddings": False, "init": "mobilellm"},
        {"tie_embeddings": False, "grow_heads": True},
    ],
)
def test_coordinates_move_alike_at_every_width_under_mup_alone(model: dict[str, object]) -> None:
    # The coordinate check of arXiv 2203.03466, appendix D.1: slope of the change over the width,
    # both in powers of two. 0 is muP's promise; the standard parametrization grows.
    torch.set_num_threads(1)
    found = {
        kind: [changes(width, kind, model) for width in WIDTHS] for kind in ("mup", "standard")
    }
    slopes = {
        kind: {
            name: float(np.polyfit(np.log2(WIDTHS), [math.log2(row[name]) for row in rows], 1)[0])
            for name in rows[0]
        }
        for kind, rows in found.items()
    }
    assert {name: s for name, s in slopes["mup"].items() if abs(s) > 0.25} == {}, slopes
    assert min(slopes["standard"].values()) > 0.8, slopes
