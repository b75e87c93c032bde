"""A checkpoint as a Hugging Face folder, with a card that says where it came from."""

import shutil
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import yaml

from thriftlm import __version__, corpora, prices
from thriftlm.release.checkpoints import TrainedModel
from thriftlm.spec import InputError, RunSpec
from thriftlm.training.checkpoint import RunState
from thriftlm.training.tokenizer import END_NAMES
from thriftlm_models import hf
from thriftlm_models.counts import stored_params

Dtype = Literal["float32", "bfloat16"]


def export(model: TrainedModel, folder: Path, dtype: Dtype) -> dict[str, Any]:
    """What `thriftlm export --json` prints; `folder` gets weights, configuration, tokenizer, card.

    It appears whole or not at all.

    Raises:
        InputError: the folder is not empty or cannot be written, the model comes from Hugging Face
            already or has no tokenizer, or no class there computes its shape.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; choose another folder or remove it")
    if model.state is None:
        raise InputError(
            f"{model.path} is a Hugging Face folder already; give a checkpoint of thriftlm train"
        )
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a kill left
        written = _write(model, model.state, partial, dtype)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except ValueError as error:
        raise InputError(f"{model.path} cannot be exported: {error}") from error
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error
    return {
        "folder": str(folder),
        "architecture": written.architecture,
        "stored_params": stored_params(model.decoder.spec),
        "exported_params": sum(tensor.numel() for tensor in written.weights.values()),
        "dtype": dtype,
        "notes": list(written.notes),
    }


def _write(model: TrainedModel, state: RunState, folder: Path, dtype: Dtype) -> hf.HfModel:
    from transformers import PreTrainedTokenizerFast  # seconds

    tokenizer, context = model.tokenizer(), state.run.data.seq_len
    end = next((name for name in END_NAMES if tokenizer.token_to_id(name) is not None), None)
    written = hf.save(
        model.decoder,
        folder,
        context=context,
        dtype=getattr(torch, dtype),
        token_ids={"eos_token_id": None if end is None else tokenizer.token_to_id(end)},
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, model_max_length=context
    ).save_pretrained(folder)
    (folder / "README.md").write_text(card(state, written, dtype), encoding="utf-8")
    return written


def card(state: RunState, written: hf.HfModel, dtype: Dtype) -> str:
    """The model card, in Markdown with the front matter that the hub reads."""
    facts = [f"| {name} | {value} |" for name, value in training_facts(state)]
    notes = [f"- {note}" for note in written.notes]
    spec = state.run.model_dump(mode="json", include={"model", "optim"}, exclude_defaults=True)
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [thriftlm]",
            "---",
            "",
            f"# A language model of {stored_params(state.run.model):,} parameters",
            "",
            f"Exported by thriftlm {__version__} as `{written.architecture}` in {dtype}.",
            "",
            *(notes and [*notes, ""]),
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            "```",
            "",
            "## Training",
            "",
            "| | |",
            "|---|---|",
            *facts,
            "",
            "What is not at its default, as thriftlm reads it:",
            "",
            "```yaml",
            yaml.safe_dump(spec, sort_keys=False).rstrip(),
            "```",
            "",
        ]
    )


def training_facts(state: RunState) -> list[tuple[str, str]]:
    """How a model was trained, each fact in words; measured unless it says otherwise."""
    run, last = state.run, state.curve[-1]
    loss = "not measured" if last.val_loss is None else f"{last.val_loss:.4f} nats/token"
    system = run.system
    return [
        ("data", training_data(run)),
        ("tokens", f"{last.tokens:,} of {run.tokens:,}"),
        ("validation loss", loss),
        ("seed", str(run.seed)),
        ("system", f"{system.n_gpus} x {system.gpu}, {system.strategy}, {system.precision}"),
        ("cost", training_cost(state)),
        ("search", run.origin or "none: a run of its own"),
        ("exported", datetime.now(UTC).date().isoformat()),
    ]


def training_data(run: RunSpec) -> str:
    """The corpus by name, without the folders of the machine it lay on."""
    data = run.data
    corpus, tokenizer = corpora.label(data.corpus), data.tokenizer
    if tokenizer.endswith(".json"):
        tokenizer = Path(tokenizer).name
    return f"{corpus}, tokenizer {tokenizer}, {data.seq_len} tokens a sequence"


def training_cost(state: RunState) -> str:
    """What the training steps alone cost, from their measured speed and the catalog's price."""
    rates = [report.tokens_per_s for report in state.curve if report.tokens_per_s is not None]
    if not rates:
        return "not known: no speed was measured"
    system = state.run.system
    offer = prices.price(system)
    hours = state.curve[-1].tokens / (median(rates) * system.n_gpus) / 3600
    unit = "A100-40GB hours" if offer.normalised else "USD"
    cost = hours * prices.usd_per_hour(system)
    return (
        f"{cost:.4g} {unit} for {hours:.3g} hours of training steps at their measured speed and "
        f"list prices ({offer}); start-up, validation and idle time come on top"
    )
