"""Opening a trained model, whichever of its forms a path leads to."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from tokenizers import Tokenizer

from thriftlm.spec import InputError
from thriftlm.training import checkpoint
from thriftlm.training.checkpoint import RunState
from thriftlm.training.shard_files import TOKENIZER
from thriftlm_models import hf
from thriftlm_models.decoder import Decoder


@dataclass(frozen=True)
class TrainedModel:
    """A model with weights, ready to run on the CPU in fp32."""

    path: Path
    """The checkpoint or Hugging Face folder itself."""
    decoder: Decoder
    state: RunState | None
    """How it was trained; None where it came from elsewhere."""

    @property
    def tokenizer_path(self) -> Path:
        """Its tokenizer.json.

        Raises:
            InputError: there is none.
        """
        path = self.path / TOKENIZER
        if not path.is_file():
            raise InputError(f"{self.path} has no {TOKENIZER}; put the model's into the folder")
        return path

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer.

        Raises:
            InputError: there is none, or the file is not one.
        """
        path = self.tokenizer_path
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise InputError(f"{path} is not a tokenizer.json: {error}") from error


def open_model(path: Path) -> TrainedModel:
    """The model of a checkpoint, of a run's folder (its newest one), or of a Hugging Face folder.

    Raises:
        InputError: nothing of the kind is there, or it is damaged or of an unknown family.
    """
    if (path / "config.json").is_file():
        try:
            return TrainedModel(path, hf.from_pretrained(path), None)
        except SafetensorError as error:
            raise InputError(f"{path} cannot be read: {error}; download it again") from error
        except (OSError, ValueError) as error:
            raise InputError(str(error)) from error
    if (path / checkpoint.STATE).is_file() or checkpoint.is_name(path):
        found = path
    elif (newest := checkpoint.latest(path)) is not None:
        found = Path(newest)
    else:
        raise InputError(
            f"{path}: no checkpoint here; give a step_... folder of a run, the run's folder, or a "
            "Hugging Face folder with a config.json"
        )
    decoder, state = checkpoint.load_decoder(found)
    return TrainedModel(found, decoder, state)
