"""Worlds to search in: recorded runs with real losses, each crossed with 1,000 systems and more.

    THRIFTLM_SHARED_DATA=FOLDER python tests/benchmarks/worlds.py OUT

writes OUT/NAME.yaml (a space) and OUT/NAME.parquet (recorded runs) for each world, and prints how
far the fitted surrogates are from the data. The tables of Step Law and Misfitting have no licence,
so they are read where the variable points and nothing of them is kept here.

- `steplaw`: final losses of Step Law's 1,911 runs (arXiv 2503.04715), as a fitted surrogate of
  size, tokens, learning rate and batch; a constant trunk with a loss at every horizon.
- `misfitting`: real loss curves of arXiv 2502.18969, each extended by a surrogate fitted to all.
- `shapes`: no data but a published law (arXiv 2404.10102), with what such runs are known to do:
  sharing, depth against width, two activations with their own best rates, divergence, seed noise.
"""

import csv
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from scipy.optimize import least_squares

sys.path.insert(0, str(Path(__file__).parent))
import world_systems as hidden

from thriftlm.planning.scaling_laws import law_named
from thriftlm_models.config import ModelSpec
from thriftlm_models.counts import non_embedding_params, stored_params

Floats = NDArray[np.float64]
REPORT_RATIO = 3**0.5
"""Tokens of a report over those of the one before."""
BEYOND_BUDGET = 1.05
"""Runs are recorded to this many times the tokens of their budget."""
NOISE_NATS = 0.0013
"""Of a seed at 124M (llm.c)."""


class Recipe(NamedTuple):
    """One loss curve of a world."""

    model: dict[str, Any]
    optim: dict[str, Any]
    loss: Callable[[Floats], Floats]
    """By tokens (T,); NaN from where it diverges."""


class World(NamedTuple):
    """A space with the recipes that were trained in it."""

    name: str
    recipes: list[Recipe]
    budget_usd: float
    fixed: dict[str, Any]
    """Fields that do not vary, by section."""
    seed: int


def spec_of(model: dict[str, Any]) -> ModelSpec:
    """Widths follow the usual ratios: heads of 64, a gated layer of 8/3 of the width."""
    width = model["d_model"]
    return ModelSpec(n_heads=width // 64, d_ff=-(-8 * width // 3 // 64) * 64, vocab=32768, **model)


# --- losses ---------------------------------------------------------------------------------------


def surrogate(theta: Floats, n: Floats, d: Floats, lr: Floats, bs: Floats) -> Floats:
    """Log loss: an additive law, times bowls in log rate and log batch whose middles move."""
    e, a, b, alpha, beta, mid, by_n, by_d, curve, steep, b_mid, b_by_d, b_curve, tilt = theta
    x, y = np.log(n / 3e8), np.log(d / 1e10)
    law = np.logaddexp.reduce([np.full_like(x, e), a - alpha * x, b - beta * y])
    u = np.log(lr / 1e-3) - (mid + by_n * x + by_d * y)
    v = np.log(bs / 5e5) - (b_mid + b_by_d * y)
    bowl = curve * u**2 * np.exp(np.clip(steep * u, -2, 2)) + b_curve * v**2 + tilt * u * v
    return np.asarray(law + bowl)


START = np.array([0.5, -0.7, -0.7, 0.34, 0.28, 0.5, -0.5, 0.2, 5e-3, 0.2, 0.0, 0.4, 2e-3, 0.0])


def fitted(n: Floats, d: Floats, lr: Floats, bs: Floats, loss: Floats) -> tuple[Floats, Floats]:
    """Coefficients and residuals in log loss."""
    found = least_squares(
        lambda theta: surrogate(theta, n, d, lr, bs) - np.log(loss),
        START,
        loss="soft_l1",
        f_scale=0.005,
        max_nfev=4000,
    )
    return np.asarray(found.x), np.asarray(surrogate(found.x, n, d, lr, bs) - np.log(loss))


def told(name: str, residuals: Floats) -> None:
    size = np.abs(residuals)
    print(
        f"{name}: surrogate of {len(size)} losses, error median {np.median(size):.3%}, "
        f"p90 {np.quantile(size, 0.9):.3%}, largest {size.max():.2%}"
    )


def steplaw(folder: Path) -> World:
    """Five widths by three depths, seven rates, three batches."""
    rows = list(csv.DictReader((folder / "steplaw.csv").read_text().splitlines()))
    n, d, lr, bs, loss = (
        np.array([float(row[key]) for row in rows]) for key in ("N", "D", "lr", "bs", "loss")
    )
    best: dict[tuple[float, float], float] = defaultdict(lambda: np.inf)
    for key, value in zip(zip(n, d, strict=True), loss, strict=True):
        best[key] = min(best[key], value)
    near = loss < 1.06 * np.array([best[key] for key in zip(n, d, strict=True)])
    theta, errors = fitted(n[near], d[near], lr[near], 2048 * bs[near], loss[near])
    told(f"steplaw ({(~near).sum()} runs beyond 1.06x the best of their cell left out)", errors)
    recipes = []
    for width, depth, rate, batch in product(
        (768, 1024, 1280, 1536, 2048),
        (8, 12, 16),
        np.geomspace(2.5e-4, 1.6e-2, 7),
        (131072, 524288, 2097152),
    ):
        model = {"d_model": width, "n_layers": depth}
        recipes.append(_recipe(model, float(rate), batch, theta))
    return World("steplaw", recipes, 150.0, {}, 1)


def _recipe(
    model: dict[str, Any], rate: float, batch: int, theta: Floats, extra: Any = None
) -> Recipe:
    n = float(non_embedding_params(spec_of(model)))

    def loss(tokens: Floats) -> Floats:
        same = np.ones_like(tokens)
        log_loss = surrogate(theta, n * same, tokens, rate * same, batch * same)
        return np.asarray(np.exp(log_loss + (0 if extra is None else extra(tokens))))

    return Recipe(model, {"lr": float(f"{rate:.4g}"), "batch_tokens": batch}, loss)


MISFITTING_SHAPES = {  # width and depth whose parameters come nearest
    12047168: (384, 7),
    16865856: (448, 7),
    25174528: (512, 8),
    35842752: (576, 9),
    49165440: (640, 10),
    71386304: (768, 10),
    99112704: (832, 12),
    199101120: (1088, 14),
    302624640: (1216, 17),
    393268480: (1344, 18),
    1002009344: (1856, 24),
}


def misfitting(folder: Path) -> World:
    """The longest real curve of each size and rate, and a surrogate beyond its ends."""
    rows = csv.DictReader((folder / "misfitting_curves.csv").read_text().splitlines())
    curves: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if int(row["current_steps"]) >= 100:
            key = float(row["N_no_emb"]), float(row["peak_lr"]), row["sweep"], row["total_steps"]
            curves[key].append((float(row["D"]), float(row["loss"])))
    longest: dict[Any, Any] = {}
    for (n, lr, *_), points in curves.items():
        if len(points) > len(longest.get((n, lr), ())):
            longest[n, lr] = sorted(points)
    table = np.array([(n, d, lr, loss) for (n, lr), ps in longest.items() for d, loss in ps])
    settled = table[:, 1] > 5e8
    n, d, lr, loss = table[settled].T
    theta, errors = fitted(n, d, lr, np.full_like(n, 5e5), loss)
    told("misfitting (beyond the ends of the real curves)", errors)
    recipes = []
    for (size, rate), points in sorted(longest.items()):
        at, real = np.array(points).T
        keep = at > 3e8
        if keep.sum() < 3:
            continue
        width, depth = MISFITTING_SHAPES[int(size)]
        model = {"d_model": width, "n_layers": depth}
        plain = _recipe(model, rate, 524288, theta)
        gap = np.log(real[keep]) - np.log(plain.loss(at[keep]))
        recipes.append(_recipe(model, rate, 524288, theta, _gap(np.log(at[keep]), gap)))
    fixed = {"optim": {"batch_tokens": 524288}}
    return World("misfitting", recipes, 60.0, fixed, 2)


def _gap(at: Floats, gap: Floats) -> Callable[[Floats], Floats]:
    """What a real curve differs from the surrogate by, held beyond its ends."""
    return lambda tokens: np.asarray(np.interp(np.log(tokens), at, gap))


def shapes() -> World:
    """Sharing, depth, activation, rate and batch over a published law."""
    law = law_named("epoch").law
    noise = np.random.default_rng(3)
    best_rate = {"swiglu": 0.4, "gelu": 1.1}
    gain = {"swiglu": 0.0, "gelu": 0.011}
    shared = {"none": 0.0, "immediate": -0.008}
    recipes = []
    for width, depth, sharing, activation, rate, batch in product(
        (512, 768, 1024, 1536),
        (6, 12, 24),
        shared,
        best_rate,
        np.geomspace(2e-4, 1.3e-2, 6),
        (262144, 1048576),
    ):
        model = {"d_model": width, "n_layers": depth, "sharing": sharing, "activation": activation}
        n = float(non_embedding_params(spec_of(model)))
        offset = gain[activation] + shared[sharing] + noise.normal(0, 0.0015)
        offset += 0.004 * np.log(width / depth / 64) ** 2

        def loss(tokens: Floats, n=n, offset=offset, rate=rate, batch=batch, act=activation):
            u = np.log(rate / (best_rate[act] * 1.79 * n**-0.713 * tokens**0.307))
            v = np.log(batch / (0.58 * tokens**0.571))
            bowl = 0.006 * u**2 * np.exp(np.clip(0.35 * u, -2, 2)) + 0.0015 * v**2
            late = 0.05 * np.exp(-tokens / 4e8)  # warm-up and its tail
            broken = rate > 9 * best_rate[act] * 1.79 * n**-0.713 * 1e10**0.307
            value = law.loss(n, tokens) * np.exp(offset + bowl + late)
            return np.where(broken & (tokens > 3e8), np.nan, value)

        optim = {"lr": float(f"{rate:.4g}"), "batch_tokens": batch}
        recipes.append(Recipe(model, optim, loss))
    print("shapes: a published law with assumed effects; nothing is fitted")
    return World("shapes", recipes, 150.0, {}, 3)


# --- tables ---------------------------------------------------------------------------------------


def build(world: World, out: Path) -> None:
    """The space and the recorded runs of a world."""
    listed = hidden.systems()
    price = hidden.usd_per_hour(listed)
    speeds = {key: hidden.truth(spec_of(dict(key)), listed, world.seed) for key in models(world)}
    ratio = REPORT_RATIO
    parts: dict[str, list[Any]] = defaultdict(list)
    horizons = []
    noise = np.random.default_rng(world.seed)
    for number, recipe in enumerate(world.recipes):
        batch = recipe.optim["batch_tokens"]
        speed = speeds[tuple(recipe.model.items())]
        passes = np.array([one["micro_batch"] * one["n_gpus"] * hidden.SEQ_LEN for one in listed])
        valid = np.flatnonzero(batch % passes == 0)
        buys = np.nanmax(world.budget_usd * 3600 * (speed / price)[valid])
        horizons.append(buys)
        tokens = buys * BEYOND_BUDGET / ratio ** np.arange(9.0)[::-1]
        loss = recipe.loss(tokens) + noise.normal(0, NOISE_NATS, len(tokens))
        usable = np.isfinite(loss)
        length = len(tokens) if usable.all() else int(np.argmin(usable)) + 1
        ending = "done" if usable.all() else "diverged"
        for s in valid.tolist():
            oom = np.isnan(speed[s])
            rows = 1 if oom else length
            parts["recipe"].append(np.full(rows, number))
            parts["system"].append(np.full(rows, s))
            parts["tokens"].append(np.zeros(1) if oom else tokens[:length])
            parts["loss"].append(np.full(1, np.nan) if oom else loss[:length])
            parts["tokens_per_s"].append(np.full(rows, speed[s]))
            parts["usd_per_hour"].append(np.full(rows, price[s]))
            state = np.full(rows, 0)
            state[-1] = 3 if oom else {"done": 1, "diverged": 2}[ending]
            parts["status"].append(state)
    write(world, listed, {k: np.concatenate(v) for k, v in parts.items()}, out)
    write_space(world, listed, float(np.median(horizons)), out)
    print(
        f"{world.name}: {len(world.recipes)} recipes x {len(listed)} systems, "
        f"D_B {min(horizons):.3g} to {max(horizons):.3g} tokens for {world.budget_usd:g} USD"
    )


def models(world: World) -> set[tuple[tuple[str, Any], ...]]:
    return {tuple(recipe.model.items()) for recipe in world.recipes}


def write(world: World, listed: Sequence[dict[str, Any]], parts: Any, out: Path) -> None:
    recipe, system = parts["recipe"], parts["system"]
    words = pa.array(["running", "done", "diverged", "oom"])

    def coded(codes: Any, values: list[Any]) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(values))

    run = recipe.astype(np.int64) * len(listed) + system
    codes, index = np.unique(run, return_inverse=True)
    names = [f"r{one // len(listed)}-s{one % len(listed)}" for one in codes.tolist()]
    columns = {"run_id": coded(index, names)}
    for section in ("model", "optim"):
        for field in getattr(world.recipes[0], section):
            values = [getattr(one, section)[field] for one in world.recipes]
            columns[f"{section}.{field}"] = _column(recipe, values)
    for field in listed[0]:
        columns[f"system.{field}"] = _column(system, [one[field] for one in listed])
    counted = [stored_params(spec_of(one.model)) for one in world.recipes]
    columns["params"] = pa.array(np.array(counted)[recipe])
    for name in ("tokens", "loss", "tokens_per_s", "usd_per_hour"):
        columns[name] = pa.array(parts[name], from_pandas=True)
    columns["status"] = pa.DictionaryArray.from_arrays(pa.array(parts["status"]), words)
    pq.write_table(pa.table(columns), out / f"{world.name}.parquet", compression="zstd")


def _column(codes: Any, values: list[Any]) -> Any:
    distinct = list(dict.fromkeys(values))
    places = np.array([distinct.index(value) for value in values], np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(places[codes]), pa.array(distinct))


def write_space(world: World, listed: Sequence[dict[str, Any]], horizon: float, out: Path) -> None:
    def choices(records: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        return {key: _sorted({one[key] for one in records}) for key in records[0]}

    optim = choices([one.optim for one in world.recipes]) | world.fixed.get("optim", {})
    rates = sorted(optim["lr"])
    space = {
        "name": world.name,
        "data": {"corpus": "python-stdlib", "tokenizer": "bpe:32768", "seq_len": hidden.SEQ_LEN},
        "training_budget": {"usd": world.budget_usd},
        "search_budget": {"usd": 3 * world.budget_usd},
        "search": {
            "algorithm": "factored",
            "max_concurrent": 1,
            "fidelity": {"min_tokens": int(horizon / 27), "max_tokens": int(horizon)},
        },
        "space": {
            "model": {
                **choices([one.model for one in world.recipes]),
                "head_dim": 64,
                "n_heads": {"derive": "d_model/head_dim"},
                "d_ff": {"ratio": 2.6667, "multiple_of": 64},
            },
            "optim": {**optim, "lr": {"loguniform": [rates[0], rates[-1]]}, "schedule": "constant"},
            "system": {**choices(listed), "cloud": "aws", "precision": "amp_bf16"},
        },
    }
    (out / f"{world.name}.yaml").write_text(yaml.safe_dump(space, sort_keys=False))


def _sorted(values: set[Any]) -> list[Any]:
    return sorted(values, key=lambda value: (isinstance(value, str), value))


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(os.environ["THRIFTLM_SHARED_DATA"])
    makers = {
        "steplaw": lambda: steplaw(folder),
        "misfitting": lambda: misfitting(folder),
        "shapes": shapes,
    }
    for name in sys.argv[2:] or makers:
        build(makers[name](), out)


if __name__ == "__main__":
    main()
