import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from thriftlm.spec import DataSpec, InputError
from thriftlm.training.corpus import corpus_fingerprint, documents, split, survey
from thriftlm.training.sources import Document
from thriftlm.training.tokenizer import (
    END_OF_DOCUMENT,
    encode,
    end_id,
    make_tokenizer,
    pieces,
    tokenizer_identity,
    tokenizer_vocab,
    train_bpe,
    vocab_size,
)

TEXTS = [f"document {number}\n" + "alpha beta gamma " * number for number in range(1, 41)]


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return path


def names(corpus: object) -> list[str]:
    return [document.name for document in documents(str(corpus))]


def sides(corpus: object, fraction: float) -> dict[str, list[str]]:
    facts = survey(str(corpus))
    parts: dict[str, list[str]] = {"train": [], "validation": []}
    for document in documents(str(corpus)):
        for name, text in split(document.text, facts, fraction):
            parts[name].append(text)
    return parts


def test_python_stdlib_is_the_interpreters_library_without_packages() -> None:
    found = list(documents("python-stdlib"))
    texts = {document.name: document.text for document in found}
    assert texts["json/__init__.py"] == Path(json.__file__).read_bytes().decode()
    assert len(texts) == len(found) > 500
    assert list(texts) == sorted(texts)
    assert not any("site-packages" in name or "__pycache__" in name for name in texts)
    assert {"py", "txt"} <= {name.rpartition(".")[2] for name in texts}


def test_folder_takes_text_and_jsonl_in_order_of_name(tmp_path: Path) -> None:
    write(tmp_path, {"b.txt": "two", "a/z.md": "one", "blank.txt": " \n", "c.png": b"\x89\xff"})
    write(tmp_path, {".git/x.txt": "no", "__pycache__/y.py": "no", "d.jsonl": '{"text": "t"}\n'})
    assert list(documents(str(tmp_path))) == [
        Document("a/z.md", "one"),
        Document("b.txt", "two"),
        Document("d.jsonl:1", "t"),
    ]


def test_glob_crosses_folders_and_takes_what_it_names(tmp_path: Path) -> None:
    write(tmp_path, {"a.log": "1", "x/b.log": "2", "x/y/c.log": "3", "x/d.txt": "4"})
    assert names(tmp_path / "**" / "*.log") == ["a.log", "x/b.log", "x/y/c.log"]
    assert names(tmp_path / "x" / "*.log") == ["b.log"]
    assert names(tmp_path / "a.log") == ["a.log"]


def test_relative_corpus_starts_at_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"texts/a.txt": "1", "texts/[b].txt": "2"})
    monkeypatch.chdir(tmp_path)
    assert names("texts/*.txt") == ["[b].txt", "a.txt"]
    assert names("texts/[b].txt") == ["[b].txt"]  # a file that exists is no glob


def test_text_is_kept_to_the_byte(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "line\r\n\tümlaut \U0001f600\n"})
    assert next(documents(str(tmp_path))).text == "line\r\n\tümlaut \U0001f600\n"


def test_jsonl_gives_a_document_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, {"a.jsonl": '{"text": "one\\ntwo"}\n\n{"text": ""}\n{"text": "é"}'})
    assert list(documents(str(path / "a.jsonl"))) == [
        Document("a.jsonl:1", "one\ntwo"),
        Document("a.jsonl:4", "é"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "no valid JSON"),
        (b'{"text": "\xff"}', "no valid JSON"),
        (b"[1]", "a JSON list"),
        (b'{"content": "x"}', r"the fields are \['content'\]"),
        (b'{"text": 3}', '"text" is a JSON int'),
        (b'{"text": "\\ud800"}', "no valid Unicode"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    write(tmp_path, {"a.jsonl": b'{"text": "fine"}\n\n' + line + b"\n"})
    with pytest.raises(InputError, match=rf"a\.jsonl:3: .*{message}"):
        survey(str(tmp_path / "a.jsonl"))


def test_what_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist.*python-stdlib.*relative ones start at"):
        documents(str(tmp_path / "missing.txt"))
    with pytest.raises(InputError, match=r"did you mean 'python-stdlib'"):
        documents("python-stdlb")
    with pytest.raises(InputError, match="matches no file"):
        documents(str(tmp_path / "*.txt"))
    with pytest.raises(InputError, match="folder without text files"):
        documents(str(tmp_path))


def test_text_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"latin/a.txt": b"caf\xe9", "blank/a.txt": "\n\n"})
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8 text \(byte 3\)"):
        survey(str(tmp_path / "latin"))
    with pytest.raises(InputError, match="holds no text"):
        survey(str(tmp_path / "blank"))


def test_fingerprint_depends_on_names_and_texts_and_not_on_the_place(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"a.txt": "one", "b.txt": "two"}
    one, two = write(tmp_path / "1", files), write(tmp_path / "2", files)
    before = corpus_fingerprint(str(one))
    assert before == corpus_fingerprint(str(two)) == corpus_fingerprint(str(two / "*.txt"))
    write(one, {"b.txt": "twO"})
    (two / "b.txt").rename(two / "c.txt")
    assert len({before, corpus_fingerprint(str(one)), corpus_fingerprint(str(two))}) == 3


def test_split_holds_out_about_its_fraction_and_each_document_once(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(2000)]
    parts = sides(jsonl(tmp_path / "a.jsonl", texts), 0.1)
    assert sorted(parts["train"] + parts["validation"]) == sorted(texts)
    assert 150 < len(parts["validation"]) < 250


def test_split_is_stable_when_documents_are_added_or_shuffled(tmp_path: Path) -> None:
    before = sides(jsonl(tmp_path / "a.jsonl", TEXTS), 0.2)
    more = [*TEXTS, *(f"more {number}" for number in range(100))]
    random.Random(0).shuffle(more)
    after = sides(jsonl(tmp_path / "b.jsonl", more), 0.2)
    assert set(before["train"]) <= set(after["train"])
    assert set(before["validation"]) <= set(after["validation"])


def test_equal_texts_do_not_leak_across_the_split(tmp_path: Path) -> None:
    parts = sides(jsonl(tmp_path / "a.jsonl", TEXTS * 3), 0.3)
    assert not set(parts["train"]) & set(parts["validation"])
    assert len(parts["validation"]) % 3 == 0


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_both_splits_have_a_document_when_there_are_two(tmp_path: Path, fraction: float) -> None:
    for number in range(10):
        path = jsonl(tmp_path / f"{number}.jsonl", [f"a {number}", f"b {number}", f"a {number}"])
        parts = sides(path, fraction)
        assert parts["train"]
        assert parts["validation"]


def test_single_document_is_cut_at_its_tail(tmp_path: Path) -> None:
    text = "".join(f"{number} " for number in range(1000))
    parts = sides(write(tmp_path, {"a.txt": text}) / "a.txt", 0.25)
    assert parts["train"] + parts["validation"] == [
        text[: -len(text) // 4],
        text[-len(text) // 4 :],
    ]


def test_bpe_has_exactly_n_ids_and_gives_the_text_back() -> None:
    tokenizer = train_bpe(TEXTS, 280)
    assert vocab_size(tokenizer) == 280
    assert tokenizer.token_to_id(END_OF_DOCUMENT) == end_id(tokenizer, "bpe:280") == 0
    text = "  \U0001f600 new\r\n\n  words\t<|endoftext|> \x00"
    (ids,) = encode(tokenizer, [text])
    assert 0 not in ids  # the name of the end token inside a text does not end it
    assert tokenizer.decode(ids) == text


def test_bpe_of_a_small_corpus_has_fewer_ids() -> None:
    assert 257 <= vocab_size(train_bpe(["ab ab"], 1000)) < 265


def test_bpe_is_the_same_in_another_process(tmp_path: Path) -> None:
    code = (
        "import json, sys; from thriftlm.training.tokenizer import train_bpe;"
        "print(train_bpe(json.load(sys.stdin), 300).to_str())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "RAYON_NUM_THREADS": "1"},
    )
    assert run.stdout.strip() == train_bpe(TEXTS, 300).to_str()


def test_pieces_join_to_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thriftlm.training.tokenizer.PIECE_CHARS", 10)
    text = "one\ntwo\nthree\n" + "x" * 25 + "\nend"
    cut = list(pieces(text))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 10
    assert cut[0] == "one\ntwo\n"


def test_tokenizer_from_a_path_or_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained = train_bpe(TEXTS, 270)
    trained.enable_truncation(4)
    trained.enable_padding(length=9)
    trained.save(str(path))
    for name in (str(path), str(tmp_path)):
        tokenizer = make_tokenizer(DataSpec(tokenizer=name), [])
        assert tokenizer_vocab(name) == vocab_size(tokenizer) == 270
        (ids,) = encode(tokenizer, [TEXTS[5]])
        assert tokenizer.decode(ids) == TEXTS[5]  # neither cut nor padded
    identity = tokenizer_identity(str(path))
    trained.no_padding()
    trained.save(str(path))
    assert tokenizer_identity(str(path)) != identity


def test_vocabulary_is_not_known_of_names() -> None:
    assert tokenizer_vocab("bpe:4096") is None
    assert tokenizer_vocab("TinyLlama/TinyLlama_v1.1") is None


@pytest.mark.parametrize("name", ["missing/tokenizer.json", "./missing", "a/b/c", "x.json", ""])
def test_path_without_a_tokenizer_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"no file and no folder with a tokenizer\.json"):
        tokenizer_vocab(name)


def test_tokenizer_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    broken = write(tmp_path, {"broken.json": "{}"}) / "broken.json"
    with pytest.raises(InputError, match=r"broken\.json: not a tokenizer\.json"):
        make_tokenizer(DataSpec(tokenizer=str(broken)), [])
    with pytest.raises(InputError, match=r"data\.tokenizer bpe:N needs N"):
        make_tokenizer(DataSpec(tokenizer="bpe:12"), [])
    plain = train_bpe(TEXTS, 270).to_str().replace(END_OF_DOCUMENT, "<other>")
    path = write(tmp_path, {"plain.json": plain}) / "plain.json"
    with pytest.raises(InputError, match="no token that ends a document"):
        end_id(make_tokenizer(DataSpec(tokenizer=str(path)), []), str(path))


def test_hub_that_does_not_answer_is_an_input_error(tmp_path: Path) -> None:
    code = (
        "from thriftlm.spec import DataSpec, InputError\n"
        "from thriftlm.training.tokenizer import make_tokenizer\n"
        "try: make_tokenizer(DataSpec(tokenizer='nobody/nothing'), [])\n"
        "except InputError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert "data.tokenizer 'nobody/nothing': the hub does not give it (" in run.stdout
    assert "or use bpe:N" in run.stdout


def test_import_needs_no_torch() -> None:
    code = (
        "import thriftlm.training.shards, sys; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    env = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=env).returncode == 0
