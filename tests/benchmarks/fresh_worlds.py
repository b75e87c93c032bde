"""Worlds drawn by a generator, so that a search can be judged on ones that nobody looked at.

    python tests/benchmarks/fresh_worlds.py OUT 101 102 103

writes OUT/fresh-SEED.yaml and .parquet. Each seed draws its structure and not only its numbers:
the law's form and exponents, which fields of the model vary and what they do, how far the best
learning rate and batch lie from Step Law and how they move, the shape of curves (annealed at every
report, cosine, or a decay at the end), warm-up transients, where runs diverge, noise; cards,
gangs, prices and a throughput whose parts overlap as drawn; 50 to 1,000 recipes, all pairs of them
with systems or few. Nothing comes from thriftlm's planning package.
"""

import sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
import worlds
from world_systems import FRAGMENTATION, SEQ_LEN, STATE_BYTES, STEP_TRAFFIC

from thriftlm import catalog, prices
from thriftlm.spec import InputError, SystemSpec
from thriftlm_models.config import ModelSpec
from thriftlm_models.counts import flops_per_token, non_embedding_params, stored_params

Floats = NDArray[np.float64]
WIDTHS, DEPTHS = (256, 384, 512, 768, 1024, 1280, 1536, 2048), (4, 6, 8, 12, 16, 20, 24, 32)
EFFECTS = {
    "sharing": ("none", "immediate", "repeat_all_over"),
    "activation": ("swiglu", "gelu", "relu2"),
    "qk_norm": ("none", "learned"),
    "norm": ("rms", "layer"),
    "init": ("gpt2", "mobilellm"),
}
"""Fields of the model that a world may vary."""
CARDS = (
    *("A100-40GB", "A100-80GB", "H100-80GB", "H200-141GB", "B200-180GB"),
    *("L4-24GB", "A10G-24GB", "L40S-48GB"),
)
N_GPUS, MICRO_BATCHES = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32)
STRATEGIES = tuple(STEP_TRAFFIC)
UNTRAINED = np.log(32768)
"""Nats at which every curve begins, and bends away from its law."""


class Losses(NamedTuple):
    """How a world's recipes lose: a law, and what moves it."""

    law: Floats
    """log E, log A and log B at 3e8 parameters and 1e10 tokens, alpha, beta, outer exponent."""
    best: Floats
    """Log of the best rate at 3e8 and 1e10, its slopes in log N and log D; those of the batch."""
    bowl: Floats
    """Curvature in log rate, how lopsided, curvature in log batch, tilt."""
    curve: str
    """annealed, cosine or wsd."""
    early: Floats
    """Size of the warm-up transient and the log of its tokens."""
    diverges: float
    """Log of the rate over the best from which runs diverge."""

    def log_loss(self, n: float, tokens: Floats, end: float, rate: float, batch: int) -> Floats:
        e, a, b, alpha, beta, outer = self.law
        x, y = np.log(n / 3e8), np.log(tokens / 1e10)
        inner = np.logaddexp((a - alpha * x) / outer, (b - beta * y) / outer) * outer
        rate_0, rate_n, rate_d, batch_0, batch_d = self.best
        u = np.log(rate) - (rate_0 + rate_n * x + rate_d * y)
        v = np.log(batch) - (batch_0 + batch_d * y)
        round_, lopsided, batch_round, tilt = self.bowl
        bowl = round_ * u**2 * np.exp(np.clip(lopsided * u, -2, 2)) + batch_round * v**2
        bowl += tilt * u * v
        share = np.clip(tokens / end, 0, 1)
        left = {
            "annealed": np.zeros_like(share),
            "cosine": 0.5 + 0.5 * np.cos(np.pi * share),
            "wsd": np.clip((1 - share) / 0.2, 0, 1),
        }[self.curve]
        early = self.early[0] * np.exp(-tokens / np.exp(self.early[1]))
        whole = np.logaddexp(e, inner) + bowl + 0.04 * left + early
        return np.asarray(-np.logaddexp(-6 * whole, -6 * np.log(UNTRAINED)) / 6)


class Hardware(NamedTuple):
    """A throughput that a search has to learn: parts of a step's time, joined by a drawn norm."""

    systems: list[dict[str, Any]]
    usd_per_hour: Floats
    base: dict[str, tuple[float, float, float, float]]
    """By card: fraction of peak, width and tokens per pass of half of it, bytes/s of its links."""
    quirk: Floats
    """Log factor of each system."""
    overlap: float
    """1 adds the parts of a step, 4 nearly hides the smaller ones."""
    across: float
    """Bandwidth between nodes as a share of that inside."""
    loader: float
    """Tokens per second that the input of one node gives."""
    slow_kernel: float
    recompute: float
    memory: float
    """Factor on what fits."""

    def speed(self, model: ModelSpec, s: int) -> float:
        """Tokens per second of all GPUs; NaN where memory runs out."""
        one = self.systems[s]
        card, n, micro = catalog.gpu(one["gpu"]), one["n_gpus"], one["micro_batch"]
        if not self._fits(model, one):
            return float("nan")
        best, width, tokens, link = self.base[one["gpu"]]
        per_pass = micro * SEQ_LEN
        fraction = best * model.d_model / (model.d_model + width) * per_pass / (per_pass + tokens)
        attention = 12 * len(model.schedule) * model.d_model * SEQ_LEN
        factor = 1.0 if one.get("attention", "flash") == "flash" else self.slow_kernel
        flops = flops_per_token(model, SEQ_LEN) + attention * (factor - 1)
        if one.get("act_ckpt", "none") == "full":
            flops *= self.recompute
        compute = per_pass * flops / ((card.bf16_tflops or 0) * 1e12 * fraction)
        compute += 3e-4 * len(model.schedule)
        per_node = min(n, card.gpus_per_node or 8)
        sharing = 0.0
        if n > 1:
            bandwidth = link * (1 if n == per_node else self.across)
            sharing = 4.0 * stored_params(model) * STEP_TRAFFIC[one["strategy"]] / bandwidth
        parts = np.array([compute, sharing, per_pass * per_node / self.loader])
        seconds = (parts**self.overlap).sum() ** (1 / self.overlap)
        return float(n * per_pass / seconds * np.exp(self.quirk[s]))

    def _fits(self, model: ModelSpec, one: dict[str, Any]) -> bool:
        n = one["n_gpus"]
        whole, sharded = STATE_BYTES[one["strategy"]] if n > 1 else (16, 0)
        per_token = model.d_model * (24.0 if one.get("act_ckpt", "none") == "none" else 4.0)
        if one.get("attention", "flash") != "flash":
            per_token += 5 * model.n_heads * SEQ_LEN
        held = one["micro_batch"] * SEQ_LEN
        needed = stored_params(model) * (whole + sharded / n)
        needed += held * (len(model.schedule) * per_token + model.vocab * 8)
        has = catalog.gpu(one["gpu"]).usable_memory_gib or 0
        return bool(needed * self.memory + 1.6e9 <= has * 2**30)


def drawn_losses(rng: np.random.Generator) -> Losses:
    """Exponents span what was published: alpha .28 to .5, beta .28 to .73 (facts of this project);
    an outer exponent below 1 is the form of arXiv 2608.07222.
    """
    e = np.log(rng.uniform(1.5, 2.3))
    outer = 1.0 if rng.random() < 0.6 else rng.uniform(0.3, 0.5)
    small, short = np.log(rng.uniform([0.6, 1.0], [2.0, 3.0]))  # nats at 1e7 parameters, 1e8 tokens
    alpha, beta = rng.uniform(0.28, 0.5), rng.uniform(0.28, 0.73)
    law = np.array([e, small - alpha * np.log(30), short - beta * np.log(100), alpha, beta, outer])
    rate = np.log(1.79 * 3e8**-0.713 * 1e10**0.307) + rng.normal(0, 0.8)
    batch = np.log(0.58 * 1e10**0.571) + rng.normal(0, 0.7)
    slopes = rng.uniform(-0.9, -0.2), rng.uniform(-0.2, 0.35)
    best = np.array([rate, *slopes, batch, rng.uniform(0.2, 0.6)])
    bowl = [rng.uniform(0.003, 0.012), rng.uniform(0, 0.4), rng.uniform(5e-4, 4e-3)]
    return Losses(
        law=law,
        best=best,
        bowl=np.array([*bowl, rng.normal(0, 1e-3)]),
        curve=str(rng.choice(["annealed", "cosine", "wsd"])),
        early=np.array([rng.uniform(0, 0.3), np.log(rng.uniform(5e7, 6e8))]),
        diverges=rng.uniform(1.2, 3.0),
    )


def drawn_hardware(rng: np.random.Generator) -> Hardware:
    """40 to 1,500 systems of two to six cards."""
    fields: dict[str, Any] = {
        "gpu": rng.choice(CARDS, rng.integers(2, 7), replace=False).tolist(),
        "n_gpus": sorted(rng.choice(N_GPUS, rng.integers(2, 7), replace=False).tolist()),
        "strategy": rng.choice(STRATEGIES, rng.integers(1, 7), replace=False).tolist(),
        "micro_batch": sorted(
            rng.choice(MICRO_BATCHES, rng.integers(2, 5), replace=False).tolist()
        ),
    }
    if rng.random() < 0.6:
        fields["attention"] = ["flash", "math"]
    if rng.random() < 0.5:
        fields["act_ckpt"] = ["none", "full"]
    every = [dict(zip(fields, values, strict=True)) for values in product(*fields.values())]
    every = [x for x in every if x["n_gpus"] > 1 or x["strategy"] == fields["strategy"][0]]
    listed = [(one, price) for one in every if (price := _listed_price(one)) is not None]
    most = int(np.exp(rng.uniform(np.log(40), np.log(1500))))
    kept = [listed[i] for i in sorted(rng.permutation(len(listed))[:most].tolist())]
    discount = {card: np.exp(rng.normal(0, 0.2)) for card in fields["gpu"]}
    quirks = [
        {key: rng.normal(0, sd) for key in dict.fromkeys(tuple(x[n] for n in names) for x in every)}
        for names, sd in ((("gpu",), 0.15), (("gpu", "strategy"), 0.1), (("n_gpus",), 0.06))
    ]
    names = (("gpu",), ("gpu", "strategy"), ("n_gpus",))
    quirk = [
        sum(q[tuple(x[k] for k in n)] for q, n in zip(quirks, names, strict=True)) for x, _ in kept
    ]
    return Hardware(
        systems=[one for one, _ in kept],
        usd_per_hour=np.array([price * discount[one["gpu"]] for one, price in kept]),
        base={
            card: (
                rng.uniform(0.35, 0.7),
                rng.uniform(100, 1000),
                rng.uniform(300, 4000),
                np.exp(rng.uniform(np.log(6e9), np.log(3e11))),
            )
            for card in fields["gpu"]
        },
        quirk=np.array(quirk) + rng.normal(0, 0.02, len(kept)),
        overlap=rng.uniform(1, 4),
        across=rng.uniform(0.05, 0.5),
        loader=np.exp(rng.uniform(np.log(3e5), np.log(3e7))),
        slow_kernel=rng.uniform(1.5, 4),
        recompute=rng.uniform(1.2, 1.45),
        memory=FRAGMENTATION * np.exp(rng.normal(0, 0.15)),
    )


def _listed_price(one: dict[str, Any]) -> float | None:
    strategy = "single" if one["n_gpus"] == 1 else one["strategy"]
    spec = {**one, "strategy": strategy, "cloud": "aws", "precision": "amp_bf16"}
    try:
        return prices.usd_per_hour(SystemSpec(**spec))
    except InputError:
        return None


def drawn_recipes(rng: np.random.Generator, losses: Losses) -> list[dict[str, Any]]:
    """50 to 1,000 recipes: a random part of a grid, or rates drawn one by one."""
    count = int(np.exp(rng.uniform(np.log(50), np.log(1000))))
    low = rng.integers(0, 4)
    widths, depths = WIDTHS[low : low + rng.integers(3, 6)], DEPTHS[: rng.integers(3, 9)]
    varied = rng.choice(list(EFFECTS), rng.integers(0, 4), replace=False).tolist()
    middle = losses.best[0] + rng.normal(0, 0.7)
    rates = np.exp(middle + np.linspace(-2.2, 2.2, 7))
    batches = (2 ** rng.choice(np.arange(17, 22), rng.integers(1, 4), replace=False)).tolist()
    loose = rng.random() < 0.5
    found = {}
    while len(found) < count:
        model: dict[str, Any] = {
            "d_model": int(rng.choice(widths)),
            "n_layers": int(rng.choice(depths)),
        }
        model |= {name: str(rng.choice(EFFECTS[name])) for name in varied}
        rate = np.exp(middle + rng.uniform(-2.2, 2.2)) if loose else rng.choice(rates)
        optim = {"lr": float(f"{rate:.4g}"), "batch_tokens": int(rng.choice(batches))}
        found[str((model, optim))] = {"model": model, "optim": optim}
        if rng.random() < 1 / (50 * count):  # a grid that holds no more
            break
    return list(found.values())


def effect_of(rng: np.random.Generator, recipes: list[dict[str, Any]]) -> Floats:
    """Log loss that a recipe's architecture adds, at its size (R,)."""
    total = np.zeros(len(recipes))
    log_n = np.log([float(non_embedding_params(worlds.spec_of(r["model"]))) for r in recipes])
    for name in [name for name in recipes[0]["model"] if name in EFFECTS]:
        gain = {word: rng.normal(0, 0.008) for word in EFFECTS[name]}
        tilt = {word: rng.normal(0, 0.002) for word in EFFECTS[name]}
        words = [r["model"][name] for r in recipes]
        total += [gain[w] + tilt[w] * (x - np.log(3e8)) for w, x in zip(words, log_n, strict=True)]
    aspect = [np.log(r["model"]["d_model"] / r["model"]["n_layers"]) for r in recipes]
    total += rng.uniform(1e-3, 8e-3) * (np.array(aspect) - np.log(rng.uniform(30, 120))) ** 2
    return np.asarray(total + rng.normal(0, rng.uniform(5e-4, 3e-3), len(recipes)))


def build(seed: int, out: Path) -> str:
    """The space and the recorded runs of a drawn world; a line about it."""
    rng = np.random.default_rng(seed)
    losses, hardware, budget = drawn_losses(rng), drawn_hardware(rng), np.exp(rng.uniform(2.7, 6.0))
    recipes = drawn_recipes(rng, losses)
    effects, noise = effect_of(rng, recipes), rng.uniform(5e-4, 3e-3)
    recorded = 1.0 if rng.random() < 0.5 else rng.uniform(0.05, 0.5)
    reports, ratio = int(rng.integers(7, 14)), rng.uniform(1.4, 1.9)
    specs = {str(r["model"]): worlds.spec_of(r["model"]) for r in recipes}
    everywhere = range(len(hardware.systems))
    speeds = {k: np.array([hardware.speed(m, s) for s in everywhere]) for k, m in specs.items()}
    passes = np.array([x["micro_batch"] * x["n_gpus"] * SEQ_LEN for x in hardware.systems])
    kept: list[dict[str, Any]] = []
    horizons: list[float] = []
    parts: dict[str, list[Any]] = defaultdict(list)
    for recipe, effect in zip(recipes, effects.tolist(), strict=True):
        speed, optim = speeds[str(recipe["model"])], recipe["optim"]
        valid = np.flatnonzero(optim["batch_tokens"] % passes == 0)
        if recorded < 1 and len(valid):
            valid = np.sort(rng.permutation(valid)[: max(1, int(recorded * len(valid)))])
        if not np.isfinite(speed[valid]).any():
            continue
        buys = float(np.nanmax(budget * 3600 * (speed / hardware.usd_per_hour)[valid]))
        tokens = buys * worlds.BEYOND_BUDGET / ratio ** np.arange(float(reports))[::-1]
        n = float(non_embedding_params(specs[str(recipe["model"])]))
        rate, batch = optim["lr"], optim["batch_tokens"]
        loss = np.exp(losses.log_loss(n, tokens, buys, rate, batch) + effect)
        loss *= np.exp(rng.normal(0, noise, reports))
        hot = np.log(rate) - losses.best[0] - losses.best[1] * np.log(n / 3e8)
        broke = hot + rng.normal(0, 0.2) > losses.diverges
        length = int(rng.integers(1, reports + 1)) if broke else reports
        if broke:
            loss[length - 1] = np.nan
        horizons.append(buys)
        for s in valid.tolist():
            oom = bool(np.isnan(speed[s]))
            rows = 1 if oom else length
            parts["recipe"].append(np.full(rows, len(kept)))
            parts["system"].append(np.full(rows, s))
            parts["tokens"].append(np.zeros(1) if oom else tokens[:length])
            parts["loss"].append(np.full(1, np.nan) if oom else loss[:length])
            parts["tokens_per_s"].append(np.full(rows, speed[s]))
            parts["usd_per_hour"].append(np.full(rows, hardware.usd_per_hour[s]))
            state = np.zeros(rows, int)
            state[-1] = 3 if oom else 2 if broke else 1
            parts["status"].append(state)
        kept.append(recipe)
    made = [worlds.Recipe(r["model"], r["optim"], np.asarray) for r in kept]
    world = worlds.World(f"fresh-{seed}", made, round(float(budget), 2), {}, seed)
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    worlds.write(world, hardware.systems, joined, out)
    worlds.write_space(world, hardware.systems, float(np.median(horizons)), out)
    words = sorted(set(kept[0]["model"]) & set(EFFECTS))
    return (
        f"{world.name}: {len(kept)} recipes x {len(hardware.systems)} systems, {recorded:.0%} of "
        f"pairs, {world.budget_usd:g} USD buy {min(horizons):.2g} to {max(horizons):.2g} tokens, "
        f"alpha {losses.law[3]:.2f}, beta {losses.law[4]:.2f}, outer {losses.law[5]:.2f}, "
        f"{losses.curve}, {', '.join(words) or 'no words'}"
    )


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for seed in sys.argv[2:]:
        print(build(int(seed), out), flush=True)


if __name__ == "__main__":
    main()
