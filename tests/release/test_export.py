"""A checkpoint out to Hugging Face and back, as the commands do it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from thriftlm.release.checkpoints import open_model
from thriftlm.release.export import export, training_cost
from thriftlm.spec import InputError

PROMPT = "the baker sells"


def thriftlm(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "thriftlm", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder that `thriftlm export` wrote, and what it said."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    done = thriftlm("export", trained, folder, "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_transformers_loads_it_without_code_of_ours_and_computes_the_same(
    trained: Path, exported: tuple[Path, Any]
) -> None:
    folder, said = exported
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == said["architecture"] == "LlamaForCausalLM"
    assert sum(p.numel() for p in theirs.parameters()) == said["exported_params"]
    tokens = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    ours = open_model(trained).decoder
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-4


def test_its_tokenizer_and_end_of_text_come_along(
    trained: Path, exported: tuple[Path, Any]
) -> None:
    folder, _ = exported
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "the old market\nwhere"
    assert theirs(text)["input_ids"] == open_model(trained).tokenizer().encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == 0
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 0


def test_the_card_says_data_tokens_cost_search_and_that_layers_were_unrolled(
    exported: tuple[Path, Any],
) -> None:
    folder, said = exported
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    for fact in (
        "corpus.jsonl", "tokenizer bpe:300", "61,440 of 61,440", "small-search/0123456789ab",
        "measured speed and list prices", "sharing: immediate",
    ):  # fmt: skip
        assert fact in card, fact
    assert str(folder.parent.parent) not in card  # no path of this machine
    (note,) = said["notes"]
    assert "duplicated here: 4 layers" in note
    assert note in card
    assert said["exported_params"] > said["stored_params"]


def test_cost_is_that_of_the_measured_speed(trained: Path) -> None:
    state = open_model(trained).state
    assert state is not None
    usd, hours = (float(training_cost(state).split()[i]) for i in (0, 3))
    assert usd == pytest.approx(hours * 0.044625, rel=0.01)  # a vCPU-hour of AWS c7i
    unmeasured = state.model_copy(
        update={"curve": tuple(p.model_copy(update={"tokens_per_s": None}) for p in state.curve)}
    )
    assert training_cost(unmeasured) == "not known: no speed was measured"


def test_a_hugging_face_folder_is_not_exported_again(
    exported: tuple[Path, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is a Hugging Face folder already; give a checkpoint"):
        export(open_model(exported[0]), tmp_path / "again", "bfloat16")


def test_bfloat16_is_what_transformers_gets(trained: Path, tmp_path: Path) -> None:
    said = export(open_model(trained), tmp_path / "model", "bfloat16")
    assert said["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16


def test_generate_continues_as_it_learned_the_same_from_either_folder(
    trained: Path, exported: tuple[Path, Any]
) -> None:
    said = []
    for folder in (trained, exported[0]):
        done = thriftlm("generate", folder, PROMPT, "--tokens", 24, "--json")
        assert done.returncode == 0, done.stderr
        said.append(json.loads(done.stdout))
    assert said[0]["text"] == said[1]["text"]
    assert said[0]["text"].startswith(" fresh bread and a cat runs over")
    assert said[0]["new_tokens"] == 24
    assert said[0]["tokens_per_s"] > 0
    shown = thriftlm("generate", trained, PROMPT, "--tokens", 24, "--no-cache")
    assert shown.stdout == f"{PROMPT}{said[0]['text']}\n"


def test_generate_ends_with_the_document(trained: Path) -> None:
    words = " ".join(["talk the baker sells fresh bread and a cat runs over to the old market"] * 3)
    done = thriftlm("generate", trained, words, "--tokens", 400, "--temperature", 1, "--json")
    said = json.loads(done.stdout)
    assert said["ended"]
    assert said["new_tokens"] < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "{tmp}/none", "x"), "no checkpoint here; give a step_... folder"),
        (("generate", "{run}", ""), "at least one token to start from"),
        (("generate", "{run}", "x", "--top-p", 2), "top_p must lie above 0"),
        (("generate", "{run}", "x", "--temperature", "nan"), "must be a number of at least 0"),
        (("export", "{tmp}/none", "{tmp}/out"), "no checkpoint here"),
        (("export", "{run}", "{run}"), "exists and is not empty; choose another folder"),
        (("export", "{run}", "/proc/none"), "/proc/none cannot be written"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    arguments: tuple[object, ...], message: str, trained: Path, tmp_path: Path
) -> None:
    filled = [str(a).format(run=trained, tmp=tmp_path) for a in arguments]
    done = thriftlm(*filled)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_damaged_weights_are_named_not_used(
    trained: Path, exported: tuple[Path, Any], tmp_path: Path
) -> None:
    for source, pattern, said in (
        (trained, "step_*/*.distcp", "is damaged: __0_0.distcp has"),
        (exported[0], "*.safetensors", "cannot be read"),
    ):
        copy = tmp_path / source.name
        subprocess.run(["cp", "-r", source, copy], check=True)
        (file,) = copy.glob(pattern)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 4])
        with pytest.raises(InputError, match=said):
            open_model(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold the fields of a model, got a list"),
        ("not JSON", "is not JSON"),
        ('{"model_type": "llama", "hidden_size": "x"}', "makes no llama model: "),
        ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 7}', "makes no llama"),
        ('{"model_type": "mamba"}', "cannot compute a model with model_type: mamba"),
    ],
)
def test_a_bad_configuration_is_one_message(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        open_model(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_checkpoint_without_its_tokenizer_says_what_to_do(trained: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", trained, tmp_path / "run"], check=True)
    (file,) = (tmp_path / "run").glob("step_*/tokenizer.json")
    file.unlink()
    done = thriftlm("generate", tmp_path / "run", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is damaged: tokenizer.json is missing; use another checkpoint" in done.stderr


def test_a_shape_without_a_class_is_refused_before_anything_is_written(
    trained: Path, tmp_path: Path
) -> None:
    opened = open_model(trained)
    object.__setattr__(
        opened.decoder, "spec", opened.decoder.spec.model_copy(update={"activation": "relu2"})
    )
    with pytest.raises(InputError, match=r"cannot be exported: .* cannot with activation: relu2"):
        export(opened, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()
