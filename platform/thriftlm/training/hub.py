"""Corpora from Hugging Face's hub, streamed by `datasets` and named by a commit."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlencode

from thriftlm.corpora import HUB, HubCorpus, hub_corpus
from thriftlm.spec import InputError, digest
from thriftlm.training.shard_files import replace
from thriftlm.training.sources import Document

COMMIT = re.compile(r"[0-9a-f]{40}")
ROWS = 256
"""Rows that are taken out of the stream together."""
Found = TypeVar("Found")


def pinned(corpus: str, cache: Path) -> str:
    """The corpus with the commit that its revision stands for.

    The hub is asked once: the answer is kept in the cache, so that a run that goes on next week, or
    where there is no network, reads the same data. Write `revision=` to choose another one. A
    commit, and a folder of this machine, stay as they are.

    Raises:
        InputError: the hub does not answer, or has no such dataset or revision.
    """
    named = hub_corpus(corpus)
    if named.is_local or COMMIT.fullmatch(named.revision or ""):
        return corpus
    note = cache / f".revision-{digest([named.dataset, named.revision])}.json"
    if note.exists():
        commit = json.loads(note.read_text(encoding="utf-8"))["commit"]
    else:
        commit = _asked(corpus, lambda: _commit_of(named))
        content = {"dataset": named.dataset, "revision": named.revision, "commit": commit}
        replace(note, json.dumps(content))
    options = named._replace(revision=commit)._asdict()
    del options["dataset"]
    return f"{HUB}{named.dataset}?" + urlencode({k: v for k, v in options.items() if v is not None})


def stream(corpus: str) -> Iterator[Document]:
    """The documents of an `hf://` corpus, blank ones too, as they come from the hub.

    Raises:
        InputError: the hub does not answer, no such dataset, configuration, split or column, or a
            row without text.
    """
    named = hub_corpus(corpus)
    dataset = _asked(corpus, lambda: _opened(named))
    columns = dataset.column_names or []
    if named.column not in columns:
        raise InputError(
            f"data.corpus '{corpus}' has no column '{named.column}', it has {', '.join(columns)}; "
            "name the one with the text as ?column="
        )
    batches = dataset.select_columns([named.column]).iter(batch_size=ROWS)
    ask = partial(_asked, corpus, lambda: next(batches, None))
    texts = (text for batch in iter(ask, None) for text in batch[named.column])
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str | None):
            raise InputError(
                f"data.corpus '{corpus}': column '{named.column}' holds {type(text).__name__} in "
                f"row {number}; the text must be a string column"
            )
        yield Document(f"{named.split}:{number}", text or "")


def _opened(named: HubCorpus) -> Any:
    import datasets  # seconds

    found = datasets.load_dataset(
        named.dataset,
        named.config,
        split=named.split,
        revision=named.revision,
        streaming=True,
    )
    return found if found.column_names else found.resolve_features()


def _commit_of(named: HubCorpus) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(named.dataset, revision=named.revision).sha)


def _asked(corpus: str, ask: Callable[[], Found]) -> Found:
    try:
        return ask()
    except Exception as error:  # those of requests, huggingface_hub, datasets and pyarrow
        _refuse(corpus, error)


def _refuse(corpus: str, error: Exception) -> NoReturn:
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    raise InputError(
        f"data.corpus '{corpus}': datasets cannot read it ({reason}); check name, options and "
        "network, download its Parquet files and give their path, or, where shards were built "
        "before, name their commit as revision="
    ) from error
