"""A trained model as a Hugging Face folder, with a card that says where it came from."""

from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from thriftlm import __version__, catalog
from thriftlm.release.checkpoints import TrainedModel
from thriftlm.spec import InputError
from thriftlm.training.checkpoint import RunState
from thriftlm.training.tokenizer import END_NAMES
from thriftlm_models import hf
from thriftlm_models.counts import stored_params

Dtype = Literal["float32", "bfloat16"]
UNKNOWN_CONTEXT = 2048
"""Length that the configuration states for a model that came without its training."""


def export(model: TrainedModel, folder: Path, dtype: Dtype) -> dict[str, Any]:
    """What `thriftlm export --json` prints; `folder` gets weights, configuration, tokenizer, card.

    Raises:
        InputError: the folder is not empty, there is no tokenizer, or Hugging Face has no class
            for the model's shape.
    """
    from transformers import PreTrainedTokenizerFast  # seconds

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; choose another folder or remove it")
    tokenizer = model.tokenizer()
    context = model.state.run.data.seq_len if model.state else UNKNOWN_CONTEXT
    end = next((name for name in END_NAMES if tokenizer.token_to_id(name) is not None), None)
    try:
        written = hf.save(
            model.decoder,
            folder,
            context=context,
            dtype=getattr(torch, dtype),
            eos_token_id=None if end is None else tokenizer.token_to_id(end),
        )
    except ValueError as error:
        raise InputError(f"{model.path} cannot be exported: {error}") from error
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from error
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, model_max_length=context
    ).save_pretrained(folder)
    (folder / "README.md").write_text(card(model, written, dtype), encoding="utf-8")
    return {
        "folder": str(folder),
        "architecture": written.architecture,
        "stored_params": stored_params(model.decoder.spec),
        "exported_params": sum(tensor.numel() for tensor in written.weights.values()),
        "dtype": dtype,
        "notes": list(written.notes),
    }


def card(model: TrainedModel, written: hf.HfModel, dtype: Dtype) -> str:
    """The model card, in Markdown with the front matter that the hub reads."""
    spec = model.decoder.spec
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [thriftlm]",
        "---",
        "",
        f"# {spec.preset or 'language model'}, {stored_params(spec):,} parameters",
        "",
        f"Exported by thriftlm {__version__} as `{written.architecture}` in {dtype}.",
        "",
        *(f"- {note}" for note in written.notes),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
    ]
    if model.state is None:
        lines += [f"Converted from {model.path.name}; how it was trained is not recorded here."]
    else:
        lines += ["## Training", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in training_facts(model.state)]
    return "\n".join(lines) + "\n"


def training_facts(state: RunState) -> list[tuple[str, str]]:
    """How a model was trained, each fact in words; measured unless it says otherwise."""
    run, last = state.run, state.curve[-1]
    model, optim, system = run.model, run.optim, run.system
    loss = "not measured" if last.val_loss is None else f"{last.val_loss:.4f} nats/token"
    return [
        ("data", f"{run.data.corpus}, tokenizer {run.data.tokenizer}, {run.data.seq_len} tokens"),
        ("tokens", f"{last.tokens:,} of {run.tokens:,}"),
        ("validation loss", loss),
        (
            "model",
            f"{model.n_layers} layers, sharing {model.sharing} x{model.repeats}, "
            f"width {model.d_model}, {model.n_heads}/{model.n_kv_heads} heads, d_ff {model.d_ff}",
        ),
        (
            "optimizer",
            f"{optim.optimizer}, peak learning rate {optim.lr:g}, {optim.schedule}, "
            f"{optim.batch_tokens:,} tokens a step, seed {run.seed}",
        ),
        ("system", f"{system.n_gpus} x {system.gpu}, {system.strategy}, {system.precision}"),
        ("cost", training_cost(state)),
        ("search", run.origin or "none: a run of its own"),
        ("exported", datetime.now(UTC).date().isoformat()),
    ]


def training_cost(state: RunState) -> str:
    """USD of the training steps alone, from their measured speed and the catalog's price."""
    rates = [report.tokens_per_s for report in state.curve if report.tokens_per_s is not None]
    if not rates:
        return "not known: no speed was measured"
    system = state.run.system
    hours = state.curve[-1].tokens / (median(rates) * system.n_gpus) / 3600
    usd = hours * catalog.usd_per_hour(system)
    return (
        f"${usd:.4g} for {hours:.3g} hours of training steps at their measured speed and list "
        f"prices ({catalog.price(system)}); start-up, validation and idle time come on top"
    )
