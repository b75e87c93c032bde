"""Published facts of what fitted into memory, each with the estimate's verdict, as Markdown.

    python tests/benchmarks/memory_facts.py > tests/benchmarks/results/memory_facts.md

Apple's points are the best of every system that a figure does not show, so its facts say that some
system ran, or that none did. Its paper does not name the precision policy; the one that its facts
need is written down with each, and the verdict of the other policy beside it. No one policy gives
them all. `tests/planning/test_apple_study.py` holds the estimates to this list.
"""

from typing import Any, NamedTuple

from thriftlm.planning.cases import model_columns
from thriftlm.planning.estimate import estimate, estimate_table
from thriftlm.review.apple_study import SPACE, Study
from thriftlm.review.space_estimates import estimate_space
from thriftlm.search.spaces.space import load_space
from thriftlm.spec import SystemSpec
from thriftlm_models.config import ModelSpec

MASTERS, PURE = "fp32 masters", "all bf16"


class Fact(NamedTuple):
    """Whether runs whose fields are `fixed` fitted, and the precision policy which that needs."""

    source: str
    fixed: dict[str, Any]
    ran: bool
    policy: str = MASTERS


FACTS = (
    Fact("Figure 1", {"model": "apple-100m", "attention": "math", "batch": 1024}, ran=True),
    Fact("Figure 1", {"model": "apple-500m", "attention": "math", "batch": 1024}, ran=True),
    Fact("Figure 1", {"model": "apple-1b", "attention": "math", "batch": 512}, ran=True),
    Fact(
        "Figure 1, finding 1", {"model": "apple-1b", "attention": "math", "batch": 1024}, ran=False
    ),
    Fact("Figure 1", {"model": "apple-2b", "attention": "math", "batch": 512}, ran=True),
    Fact(
        "Figure 1, finding 1", {"model": "apple-2b", "attention": "math", "batch": 1024}, ran=False
    ),
    Fact("Figure 1", {"model": "apple-1b", "attention": "flash", "batch": 1024}, ran=True),
    Fact("Figure 1", {"model": "apple-2b", "attention": "flash", "batch": 1024}, ran=True),
    Fact("Figure 4", {"model": "apple-1b", "strategy": "ddp", "batch": 1024}, ran=True),
    Fact("Figure 4", {"model": "apple-2b", "strategy": "ddp", "batch": 512}, ran=True),
    Fact("Figure 4, finding 7", {"model": "apple-2b", "strategy": "ddp", "batch": 1024}, ran=False),
    Fact("Figure 4", {"model": "apple-2b", "strategy": "fsdp_full", "batch": 1024}, ran=True),
    Fact("Figure 4", {"model": "apple-2b", "strategy": "fsdp_grad_op", "batch": 1024}, ran=True),
    Fact("Figure 2", {"model": "apple-100m", "gpu": "A100-40GB", "n_gpus": 1}, ran=True),
    Fact("Figure 2", {"model": "apple-500m", "gpu": "A100-40GB", "n_gpus": 1}, ran=True),
    Fact("Figure 2", {"model": "apple-1b", "gpu": "A100-40GB", "n_gpus": 1}, ran=True),
    Fact("Figure 2", {"model": "apple-2b", "gpu": "A100-40GB", "n_gpus": 1}, True, PURE),
    Fact("Figure 2", {"model": "apple-2b", "gpu": "A100-80GB", "n_gpus": 1}, ran=True),
)
"""batch is global, in sequences of 1,024."""


def studies_by_policy() -> dict[str, Study]:
    """Apple's 2,280 runs on an eager stack, under either policy."""
    found = estimate_space(load_space(SPACE), ["eager"])
    pure = found.table | {"precision": ["bf16_true"] * len(found.found)}
    return {
        MASTERS: Study(found.table, found.found, "eager"),
        PURE: Study(pure, estimate_table(pure), "eager"),
    }


def other_facts() -> list[list[str]]:
    """Facts of single systems, with the bytes that the estimate needs."""
    lines = []
    for attention in ("math", "flash"):
        shape = model_columns(ModelSpec(preset="apple-100m"), 1024)
        row = shape | {"gpu": "H100-80GB", "micro_batch": 128, "stack": "eager"}
        row["attention"] = attention
        found = estimate_table({key: [value] for key, value in row.items()})[0]
        what = f"apple-100m, 128 sequences on one H100-80GB, {attention}"
        lines.append(
            ["arXiv 2410.19456, 3", what, "out", MASTERS, verdict(found.fits), found.reason]
        )
    for micro_batch, ran in ((8, "ran"), (16, "out")):
        system = SystemSpec(
            gpu="A100-40GB",
            n_gpus=16,
            strategy="fsdp_full",
            micro_batch=micro_batch,
            precision="amp_bf16",
        )
        model = ModelSpec(preset="tinyllama-1.1b")
        found = estimate(model, system, 2048, 2**21, stack="fused")
        what = f"tinyllama-1.1b, {micro_batch} sequences of 2,048 on 16 A100-40GB, fsdp_full"
        needs = f"needs {sum(found.memory_gb.values()):.0f} GB of 43"
        lines.append(["TinyLlama", what, ran, MASTERS, verdict(found.fits), needs])
    return lines


def verdict(fits: bool | None) -> str:
    """In the words of the table."""
    return "ran" if fits else "out"


def main() -> None:
    studies = studies_by_policy()
    rows = []
    for fact in FACTS:
        said = {policy: verdict(study.runs(**fact.fixed)) for policy, study in studies.items()}
        (other,) = set(said) - {fact.policy}
        what = ", ".join(f"{name} {value}" for name, value in fact.fixed.items())
        note = f"{other}: {said[other]}"
        rows.append([fact.source, what, verdict(fact.ran), fact.policy, said[fact.policy], note])
    rows += other_facts()
    print("# What fitted into memory, fact by fact\n")
    print("By `tests/benchmarks/memory_facts.py`. Figures and findings: arXiv 2410.19456.\n")
    print("| source | what | published | policy that it needs | estimated | |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    agreed = sum(row[2] == row[4] for row in rows)
    print(f"\n{agreed} of {len(rows)} agree under the policy that is named.")


if __name__ == "__main__":
    main()
