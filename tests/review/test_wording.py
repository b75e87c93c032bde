from datetime import date, timedelta

import pytest

from thriftlm.review.wording import (
    counted,
    describe,
    duration,
    limits,
    seeded,
    shortened,
    stale_prices,
    usd,
    why_ended,
)

POINT = {
    "model.n_layers": 4,
    "model.sharing": "none",
    "optim.lr": 0.0079858,
    "system.n_gpus": 2,
    "system.strategy": "fsdp_full",
    "system.micro_batch": 16,
}


def test_a_trial_in_a_line() -> None:
    assert describe(POINT, "fsdp_full", 2) == "n_layers=4 none lr=0.00799 mb=16 fsdp_full x2"


def test_a_repeat_says_its_seed() -> None:
    assert seeded(POINT, 3, None) == POINT
    assert describe(seeded(POINT, 3, "t"), "ddp", 2).endswith("mb=16 seed=3 ddp x2")


def test_one_gpu_says_the_strategy_that_ran() -> None:
    assert describe(POINT | {"system.n_gpus": 1}, "single", 1).endswith("mb=16 single x1")


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (45, "n_layers=4 none lr=0.00799 mb=16 fsdp_full x2"),
        (44, "n_layers=4 none lr=0.00799 … fsdp_full x2"),
        (30, "n_layers=4 none … fsdp_full x2"),
        (3, "… fsdp_full x2"),
    ],
)
def test_strategy_and_gpus_survive_shortening(width: int, text: str) -> None:
    assert shortened(describe(POINT, "fsdp_full", 2), width) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "$0.00"),
        (1e-9, "$0.00"),
        (0.00001234, "$0.000012"),
        (0.0005810028, "$0.000581"),
        (0.005013, "$0.00501"),
        (0.02, "$0.02"),
        (0.5, "$0.50"),
        (0.123456, "$0.123"),
        (0.9996, "$1.00"),
        (12.3, "$12.30"),
        (99.996, "$100"),
        (1234.5, "$1,234"),
    ],
)
def test_dollars(amount: float, text: str) -> None:
    assert usd(amount) == text


@pytest.mark.parametrize(("value", "text"), [(500, "500"), (2e5, "200k"), (1.62e10, "16.2B")])
def test_counted(value: float, text: str) -> None:
    assert counted(value) == text


def test_duration() -> None:
    assert (duration(65.9), duration(3600 * 2 + 61)) == ("1m05s", "2h01m")


@pytest.mark.parametrize(
    ("status", "reason", "text"),
    [
        ("stopped", "asha: not in the top 1/3 of 2 at 32768 tokens", "stopped: asha"),
        ("stopped", "search budget of 0.02 USD", "stopped: budget"),
        ("stopped", "interrupted", "stopped: interrupted"),
        ("failed", "RuntimeError: no", "failed"),
        ("done", "", "done"),
    ],
)
def test_why_a_trial_ended(status: str, reason: str, text: str) -> None:
    assert why_ended(status, reason) == text


def test_limits() -> None:
    assert limits({"usd": 0.02, "hours": None, "trials": 8}) == "$0.02, 8 trials"


def test_prices_go_stale_after_ninety_days():
    read = ["2026-03-04", None, "2026-01-01", ""]
    oldest = date(2026, 1, 1)
    assert stale_prices([], oldest) == stale_prices([None, ""], oldest) == ""
    assert stale_prices(read, oldest + timedelta(days=90)) == ""
    assert stale_prices(read, oldest + timedelta(days=91)).startswith(
        "warning: prices from 2026-01-01 on, over 90 days old; `thriftlm gpus --refresh`"
    )
