"""How a corpus is named: built-in, a path or glob, hf://, or a mixture. No file is opened here.

python-stdlib
texts/**/*.jsonl.zst            or #content, where the field is not "text"
hf://OWNER/NAME?config=sample-10BT&split=train&column=text&revision=SHA
0.7 hf://OWNER/NAME + 0.3 code/*.parquet
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

BUILT_IN_CORPORA = ("python-stdlib",)
HUB = "hf://"
SMALLEST_SHARE = 1e-4
"""Smallest weight of a mixture after they are made to sum to 1."""
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TERM = re.compile(r"(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s+(\S.*)")
FIELD = re.compile(r"[^\W\d]\w*")


class HubCorpus(NamedTuple):
    """A dataset that Hugging Face's `datasets` loads."""

    dataset: str
    """Name on the hub, or the absolute path of a folder that holds a dataset."""
    config: str | None = None
    """Configuration (subset); the dataset's default when None."""
    split: str = "train"
    """Which of its splits."""
    column: str = "text"
    """Column that holds the text."""
    revision: str | None = None
    """Branch, tag or commit; the default branch when None."""

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return self.dataset.startswith("/")


def hub_corpus(corpus: str) -> HubCorpus:
    """What an `hf://` name says.

    Raises:
        ValueError: no name, or an option that does not exist.
    """
    dataset, _, options = corpus.removeprefix(HUB).partition("?")
    if not dataset.startswith("/") and not HUB_NAME.fullmatch(dataset):
        raise ValueError(
            f"hf:// needs OWNER/NAME of a dataset or the absolute path of a folder, got '{corpus}'"
        )
    given = dict(parse_qsl(options, keep_blank_values=True))
    known = HubCorpus._fields[1:]
    wrong = [name for name, value in given.items() if name not in known or not value]
    if wrong or (options and not given):
        raise ValueError(
            f"hf:// takes ?{'=...&'.join(known)}=..., got '{wrong[0] if wrong else options}' in "
            f"'{corpus}'"
        )
    return HubCorpus(dataset, **given)


def path_and_field(corpus: str) -> tuple[str, str]:
    """A path or glob, and the field that holds the text: after a `#`, else `text`."""
    path, mark, field = corpus.rpartition("#")
    is_field = mark and FIELD.fullmatch(field) and not Path(corpus).expanduser().exists()
    return (path, field) if is_field else (corpus, "text")


def shares(corpus: str) -> tuple[tuple[str, float], ...]:
    """The corpora of a mixture with their weights, which sum to 1; a plain corpus has weight 1."""
    terms = [TERM.fullmatch(term.strip()) for term in re.split(r"\s\+\s", corpus)]
    found = [(term[2], float(term[1])) for term in terms if term]
    if len(terms) < 2 or len(found) < len(terms):
        return ((corpus, 1.0),)
    total = sum(weight for _, weight in found)
    return tuple((name, weight / total) for name, weight in found) if total else tuple(found)


def mixture(weights: Mapping[str, float]) -> str:
    """The one spelling of a mixture: sorted by name, weights that sum to 1.

    Raises:
        ValueError: no corpus, or a weight that is no share of the whole.
    """
    total = sum(weights.values())
    for name, weight in weights.items():
        if not (0 < weight < float("inf") and weight >= SMALLEST_SHARE * total):
            raise ValueError(
                f"a corpus of a mixture needs at least {SMALLEST_SHARE:g} of the weights' sum: "
                f"'{name}' has {weight:g} of {total:g}"
            )
    if not weights:
        raise ValueError("a mixture needs a corpus with a weight, as in {texts/*.txt: 0.7, ...}")
    if len(weights) == 1:
        return next(iter(weights))
    return " + ".join(f"{weights[name] / total:.6g} {name}" for name in sorted(weights))


def one_spelling(corpus: str) -> str:
    """The corpus, a mixture in its one spelling.

    Raises:
        ValueError: a corpus that is there twice, a bad weight or a bad `hf://` name.
    """
    parts = shares(corpus)
    names = [name for name, _ in parts]
    for name in names:
        if name.startswith(HUB):
            hub_corpus(name)
        if names.count(name) > 1:
            raise ValueError(f"a mixture has each corpus once, '{name}' is there twice")
    return corpus if len(parts) == 1 else mixture(dict(parts))


def anchored(corpus: str, folder: Path) -> str:
    """The same corpus with relative paths taken from `folder`."""
    moved = {
        name if name in BUILT_IN_CORPORA or name.startswith(HUB) else str(folder / name): weight
        for name, weight in shares(corpus)
    }
    return mixture(moved)


def label(corpus: str) -> str:
    """The corpus without the folders of the machine it lay on."""
    names = {}
    for name, weight in shares(corpus):
        is_public = name in BUILT_IN_CORPORA or (name.startswith(HUB) and name[len(HUB)] != "/")
        names[name if is_public else Path(name).name] = weight
    return mixture(names)
