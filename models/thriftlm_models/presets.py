"""Published shapes by name: `presets.yaml`, and Apple's rule for the sizes in between."""

import re
from functools import cache
from importlib.resources import files
from typing import Any, cast

import yaml

APPLE_RULE = re.compile(r"apple:(\d+(?:\.\d+)?)([MB])")


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Published shapes by name, each with its `source`, as `presets.yaml` has them."""
    text = files("thriftlm_models").joinpath("presets.yaml").read_text(encoding="utf-8")
    return cast(dict[str, dict[str, Any]], yaml.safe_load(text))


def preset(name: str) -> dict[str, Any]:
    """Model fields of a published shape, or of `apple:350M`, `apple:1.5B` by Apple's rule.

    Raises:
        ValueError: no such preset; names the nearest.
    """
    from difflib import get_close_matches

    if rule := APPLE_RULE.fullmatch(str(name)):
        return apple_shape(float(rule[1]) * {"M": 1e-3, "B": 1.0}[rule[2]])
    known = presets()
    if name not in known:
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
        raise ValueError(f"unknown model preset '{name}'; {hint}")
    return {key: value for key, value in known[name].items() if key != "source"}


def apple_shape(billions: float) -> dict[str, Any]:
    """Model fields for about that many 1e9 parameters, by the rule of arXiv 2410.19456, Figure 5.

    Width 1951.37 x^0.353, to the nearest multiple of 64 (the head); blocks 18.93 x^0.318, rounded;
    as in the paper's Table 2, feed-forward int(2.7 width), multi-head attention, vocabulary 32,000,
    untied. That gives the table's depths 9, 15, 19, 24 at 0.1, 0.5, 1 and 2, and its widths but for
    the first, 896 where the paper trained 832.

    Raises:
        ValueError: below a million parameters, where the rule gives no model.
    """
    if billions < 1e-3:
        raise ValueError(f"Apple's rule starts at apple:1M, got {billions * 1e3:g}M")
    d_model = max(1, round(1951.37 * billions**0.353 / 64)) * 64
    return {
        "n_layers": max(1, round(18.93 * billions**0.318)),
        "d_model": d_model,
        "n_heads": d_model // 64,
        "head_dim": 64,
        "d_ff": int(2.7 * d_model),
        "vocab": 32_000,
        "tie_embeddings": False,
    }
