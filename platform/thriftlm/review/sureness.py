"""How sure the answer of a search is, in plain sentences."""

from collections.abc import Iterator

from thriftlm.review.wording import usd
from thriftlm.search.answers.confidence import Confidence, Confirmation, StartComparison
from thriftlm.search.answers.next_dollars import NextDollars
from thriftlm.search.answers.result import SearchResult

NEXT = {
    "longer_run": "a longer run of both",
    "seeds": "another seed of both",
    "trials": "more trials",
    "probe": "a probe of systems",
}
LIMITS = {
    "max_tokens": "the longest run that the space allows (search.fidelity.max_tokens)",
    "search_budget": "what the search budget allowed",
}
UNITS = {"nats_per_token": "nats/token", "bits_per_byte": "bits/byte"}


def sentences(result: SearchResult) -> Iterator[str]:
    """The winner against the rest and the user's own, how far it was trained, what to buy next."""
    sure = result.confidence
    if sure is None:
        return
    yield against_rest(sure)
    yield trained(sure.confirmation)
    if sure.repeats.asked > 1:
        yield seeds(sure)
    for start in result.start_from:
        yield against_start(start, result)
    if result.next is not None:
        yield purchase(result.next)


def against_rest(sure: Confidence) -> str:
    """How probably it is the best, and what separates it from the runner-up."""
    said = f"the best of those tried with probability {sure.p_best:.0%}"
    if sure.runner_up is None or sure.difference is None:
        return f"{said}; no other configuration has a score"
    verdict = "decided" if sure.decided else "not decided"
    return (
        f"{said}; runner-up {sure.runner_up} is {apart(sure.difference)} (90% interval "
        f"{sure.low:+.4f} to {sure.high:+.4f} {UNITS[sure.unit]}, seeds differ by "
        f"{sure.seed_noise:.4f}): {verdict}"
    )


def apart(difference: float) -> str:
    """A loss against the winner's; a winner that is chosen for being sure may be above it."""
    return f"{abs(difference):.4f} {'worse' if difference >= 0 else 'better by prediction'}"


def trained(confirmed: Confirmation) -> str:
    """How far the winner was trained, and what ended that."""
    far = f"trained to {confirmed.tokens:,} tokens, {confirmed.share:.0%} of the training budget's"
    if confirmed.limit == "third_of_training_budget":
        return f"{far}: confirmed, a third is what that takes"
    return (
        f"{far}: {LIMITS[confirmed.limit]}; {confirmed.missing_tokens:,.0f} more make a third, "
        "from which a winner counts as confirmed"
    )


def seeds(sure: Confidence) -> str:
    """How many seeds there were of those asked for."""
    told = f"{sure.repeats.run} of {sure.repeats.asked} seeds of winner and runner-up"
    if sure.repeats.run >= sure.repeats.asked:
        return told
    if sure.repeats.usd_missing == 0:
        return f"{told}; the others broke"
    return f"{told}; the others cost {usd(sure.repeats.usd_missing)}, more than the search had left"


def against_start(start: StartComparison, result: SearchResult) -> str:
    """How much better the winner is than one of the user's own configurations."""
    name = f"start_from[{start.entry}]"
    if result.best is not None and start.trial_id == result.best.trial_id:
        return f"{name} is the winner itself"
    if start.difference is None:
        return f"{name} has no score ({start.status}), so it cannot be compared"
    money = (
        "no training budget brings it there"
        if start.usd_factor is None
        else f"it takes {start.usd_factor:.2f}x the training dollars to get there"
    )
    return (
        f"{name} ({start.trial_id}) is {apart(start.difference)} than the winner (90% interval "
        f"{start.low:+.4f} to {start.high:+.4f}); {money}"
    )


def purchase(bought: NextDollars) -> str:
    """What the next dollars should buy."""
    return (
        f"next {usd(bought.usd)}: {NEXT[bought.what]}, worth {bought.gain:.4f} of loss on average; "
        f"{bought.why}"
    )
