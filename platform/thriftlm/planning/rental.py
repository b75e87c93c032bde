"""The cheapest system for a model among those that may be rented, by estimate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from thriftlm import catalog, prices
from thriftlm.planning.constants import Calibration
from thriftlm.planning.estimate import Estimate, Estimates
from thriftlm.planning.grid import (
    BEST_MICRO_BATCHES,
    Grid,
    Row,
    estimate_systems,
    kernel_refusal,
    rank,
)
from thriftlm.planning.hyperparameters import whole_batch
from thriftlm.spec import InputError, SystemSpec
from thriftlm_models.config import ModelSpec

MOST_GPUS = 1024
"""Where counts are not given: one node, then twice as many as long as a model does not fit."""
PRECISION, STACK = "amp_bf16", "thriftlm"


@dataclass(frozen=True)
class Rented:
    """One model on the system that was chosen for it."""

    system: SystemSpec
    batch_tokens: int
    estimate: Estimate

    @property
    def tokens_per_s(self) -> float:
        """Of all GPUs together."""
        return (self.estimate.tokens_per_s_per_gpu or 0.0) * self.system.n_gpus

    def usd(self, n_tokens: float) -> float | None:
        """Dollars of so many tokens; None where no price is known."""
        price = self.estimate.usd_per_btok
        return None if price is None else price * n_tokens / 1e9

    def hours(self, n_tokens: float) -> float:
        """Hours of so many tokens."""
        return n_tokens / self.tokens_per_s / 3600


@dataclass(frozen=True)
class Rental:
    """What may be rented, and by what the choice is made."""

    gpus: tuple[str, ...] = ()
    """Types of GPU; empty: all that have a price there and a known speed."""
    n_gpus: tuple[int, ...] = ()
    """Counts; empty: one node of each type, more where the model does not fit."""
    place: Mapping[str, Any] = field(default_factory=dict)
    """Cloud, market and billing where given."""
    seq_len: int = 2048
    by_speed: bool = False
    """Take the fastest system rather than the cheapest per token."""
    calibration: Calibration | None = None
    """Of the estimates; the shipped one where not given."""
    needs_price: bool = False
    """Leave out systems without a known price; else they come after the others."""

    def best(self, model: ModelSpec, batch_tokens: float) -> Rented:
        """The system for a model at about a batch: it fits, and is cheapest per token or fastest.

        Raises:
            InputError: unknown GPU or cloud; no system holds the model, or none has a known speed,
                or price where it is needed.
        """
        nearest: list[tuple[Row, Estimate]] = []
        for counts in self._attempts:
            tried = [pair for gpu, n in counts for pair in self._try(model, gpu, n, batch_tokens)]
            good = [(row, found) for row, found in tried if self._usable(found)]
            if good:
                row, found = min(good, key=lambda pair: self._order(*pair))
                return Rented(self._system(row), int(row["batch_tokens"]), found)
            nearest = tried or nearest
        raise InputError(self._refusal(model, nearest))

    @cached_property
    def _ids(self) -> list[str]:
        if self.gpus:
            return [catalog.gpu(name).id for name in self.gpus]
        wanted = (self.place.get("cloud", "aws"), self.place.get("market", "on_demand"))
        priced = {p.gpu for p in prices.offers() if (p.cloud, p.market) == wanted}
        found = [key for key, gpu in catalog.gpus().items() if key in priced and _runs_in_bf16(gpu)]
        if not found:
            prices.price(SystemSpec(gpu="H100-80GB", **self.place))  # says what is wrong
            raise InputError(f"no GPU has a price at {' '.join(wanted)}; see thriftlm gpus")
        return found

    @cached_property
    def _attempts(self) -> list[list[tuple[str, int]]]:
        """Types with counts, in the order in which they are tried."""
        if self.n_gpus:
            return [[(gpu, n) for gpu in self._ids for n in self.n_gpus]]
        nodes = {gpu: catalog.gpus()[gpu].gpus_per_node or 1 for gpu in self._ids}
        found, factor = [], 1
        while any(node * factor <= MOST_GPUS for node in nodes.values()):
            found.append([(gpu, n * factor) for gpu, n in nodes.items() if n * factor <= MOST_GPUS])
            factor *= 2
        return found

    def _try(
        self, model: ModelSpec, gpu: str, n_gpus: int, batch_tokens: float
    ) -> list[tuple[Row, Estimate]]:
        batch = whole_batch(batch_tokens, n_gpus, self.seq_len)
        each = batch // (n_gpus * self.seq_len)
        grid = Grid(
            gpus=[gpu],
            n_gpus=[n_gpus],
            strategies=(),
            micro_batches=[size for size in BEST_MICRO_BATCHES if each % size == 0],
            attentions=(),
            checkpointings=(),
            stacks=[STACK],
            optimizer="adamw",
            precision=PRECISION,
            seq_len=self.seq_len,
            batch_tokens=batch,
            place=self.place,
        )
        rows = grid.systems(best=True)
        if kernel_refusal(model, rows[0], PRECISION):
            return []
        found = estimate_systems(model, self.seq_len, rows, self.calibration)
        return [(row | {"batch_tokens": batch}, found[i]) for i, row in self._first(rows, found)]

    def _first(self, rows: Sequence[Row], found: Estimates) -> list[tuple[int, Row]]:
        """The rows worth a look: the best that fits, and the one that needs the least memory."""
        order = sorted(range(len(rows)), key=lambda i: self._order(rows[i], found[i]))
        least = min(range(len(rows)), key=lambda i: found.memory.needed[i])
        return [(i, rows[i]) for i in dict.fromkeys((order[0], least))]

    def _order(self, row: Row, found: Estimate) -> Any:
        speed = found.tokens_per_s_per_gpu
        total = None if speed is None else speed * row["n_gpus"]
        place, price, slowness = rank(found.fits, found.usd_per_btok, total)
        return (place, slowness, price) if self.by_speed else (place, price, slowness)

    def _usable(self, found: Estimate) -> bool:
        priced = found.usd_per_btok is not None or not self.needs_price
        return bool(found.fits) and found.tokens_per_s_per_gpu is not None and priced

    def _system(self, row: Row) -> SystemSpec:
        names = ("gpu", "n_gpus", "strategy", "micro_batch", "attention", "precision")
        return SystemSpec(**{name: row[name] for name in names}, **self.place)

    def _refusal(self, model: ModelSpec, nearest: Sequence[tuple[Row, Estimate]]) -> str:
        from thriftlm_models.counts import stored_params

        what = f"a model of {stored_params(model):,} parameters"
        types = ", ".join(self._ids)
        if not nearest:
            return f"a GPU must run flash attention in bf16, {types} does not; choose another"
        if unknown := [found for _, found in nearest if found.fits is None]:
            return f"what {types} can do is not known ({unknown[0].reason}); choose another GPU"
        fitting = [(row, found) for row, found in nearest if found.fits]
        if fitting:
            row, found = fitting[0]
            system = self._system(row)
            if found.tokens_per_s_per_gpu is None:
                return f"the speed of {system.gpu} is not known ({found.reason}); choose another"
            prices.price(system)  # names where there is a price
            return f"no price is known for {system.n_gpus} x {system.gpu}; choose another cloud"
        row, found = min(nearest, key=lambda pair: sum(pair[1].memory_gb.values()))
        counts = ", ".join(map(str, self.n_gpus)) or f"up to {MOST_GPUS}"
        return (
            f"{what} must fit: at {counts} x {types} it does not, at best it "
            f"{found.reason} ({row['strategy']} over {row['n_gpus']}); take a larger GPU, more of "
            "them, or a smaller model"
        )


@cache
def _runs_in_bf16(gpu: catalog.Gpu) -> bool:
    capability = gpu.compute_capability
    return gpu.bf16_tflops is not None and capability is not None and capability >= 8
