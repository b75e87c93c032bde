"""Tokenizers: byte-level BPE trained on the corpus, a tokenizer.json, or one from the hub."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from thriftlm.spec import DataSpec, InputError

END_OF_DOCUMENT = "<|endoftext|>"
"""What ends a document in a trained tokenizer, with id 0."""
END_NAMES = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
)
"""Names under which published tokenizers have it; the first one present counts."""
PIECE_CHARS = 1 << 20
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def make_tokenizer(data: DataSpec, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; `bpe:N` is trained on `texts`.

    Raises:
        InputError: no valid name, no such file, no tokenizer in it, or the hub does not give it.
    """
    try:
        vocab = data.bpe_vocab
    except ValueError as error:
        raise InputError(f"data.{error}") from error
    if vocab is not None:
        return train_bpe(texts, vocab)
    path = tokenizer_file(data.tokenizer)
    tokenizer = _from_hub(data.tokenizer) if path is None else _from_file(path)
    # Published files often cut or pad at the length their model wants.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with `vocab` ids, or fewer where no pair is left that occurs twice.

    Id 0 ends a document, 1 to 256 are the bytes. The same texts give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (piece for text in texts for piece in pieces(text)), trainer=trainer
    )
    return tokenizer


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most 2^20 characters, cut after a newline where there is one.

    The library holds some hundred bytes per token while it encodes, so that no text should go
    through it whole.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = text.rfind("\n", start, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text; the name of a special token inside a text is ordinary text."""
    tokenizer.encode_special_tokens = True
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encoded]


def vocab_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding table needs: the highest id and one, holes included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_id(tokenizer: Tokenizer, name: str) -> int:
    """Id of the token that ends a document.

    Raises:
        InputError: the tokenizer has none of the usual names for it.
    """
    for token in END_NAMES:
        if (found := tokenizer.token_to_id(token)) is not None:
            return int(found)
    raise InputError(
        f"data.tokenizer '{name}' has no token that ends a document; add one of "
        f"{', '.join(END_NAMES)} to it, or use bpe:N"
    )


def tokenizer_vocab(name: str) -> int | None:
    """Vocabulary of a tokenizer.json, without the network; None for `bpe:N` and hub names.

    Raises:
        InputError: no such file, or no tokenizer in it.
    """
    path = tokenizer_file(name)
    return None if path is None else vocab_size(_from_file(path))


def tokenizer_identity(name: str) -> str:
    """What tells two tokenizers apart: the name, or the hash of a file's content."""
    path = tokenizer_file(name)
    return name if path is None else "sha256:" + hashlib.sha256(_bytes(path)).hexdigest()


def tokenizer_file(name: str) -> Path | None:
    """The tokenizer.json that a name means, itself or in that folder; None for any other name.

    Raises:
        InputError: it reads like a path and nothing is there.
    """
    if name.startswith("bpe:"):
        return None
    path = Path(name).expanduser()
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    if path.is_file():
        return path
    if HUB_NAME.fullmatch(name) and not name.endswith(".json") and not path.exists():
        return None
    raise InputError(
        f"data.tokenizer '{name}' is no file and no folder with a tokenizer.json (relative paths "
        f"start at {Path.cwd()}); give bpe:N, the path of a tokenizer.json, or a hub name"
    )


def _from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(_bytes(path))
    except ValueError as error:
        raise InputError(f"data.tokenizer {path}: not a tokenizer.json: {error}") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"data.tokenizer {path}: cannot be read: {error.strerror}") from error


def _from_hub(name: str) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises many kinds, a bare Exception among them
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"data.tokenizer '{name}': the hub does not give it ({reason}); check the name and "
            "the network, download its tokenizer.json and give the path, or use bpe:N"
        ) from error
