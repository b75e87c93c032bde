"""Initial weights, and how fast each parameter learns under muP.

| `init` | matrices and tables | matrices that write to the residual stream |
|---|---|---|
| `gpt2` | 0.02 | 0.02 / sqrt(2 x executed layers) |
| `mobilellm` | 0.02 | the same (facebookresearch/MobileLLM, utils/modeling_llama.py) |
| `tinyllama` | sqrt(2 / (5 x inputs)) | 1 / (sqrt(d_model) x executed layers) |

Standard deviations of a normal distribution around 0; the table of embeddings counts its width as
its inputs (jzhang38/TinyLlama, lit_gpt/model.py; its first version scaled the feed-forward's output
alone, and by its own inputs). Gains start at 1, biases at 0.

muP (arXiv 2203.03466, Tables 3 and 8, for Adam), with m = `width_factor`: matrices of the blocks
start sqrt(m) times smaller than at the base width and learn at 1/m of the learning rate; tables
keep their start and rate; the decoder divides its logits by m and scales attention by 8/C instead
of 1/sqrt(C). At the base width, with heads of 64, nothing changes.
"""

import math

import torch
from torch import Tensor, nn

from thriftlm_models.config import ModelSpec

INIT_STD = 0.02


@torch.no_grad()
def init_weights(module: nn.Module, model: ModelSpec, seed: int) -> None:
    """Fills every parameter of a decoder, drawn on the CPU so that devices agree."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        drawn = torch.empty(parameter.shape, device="cpu", dtype=torch.float32)
        parameter.copy_(
            drawn.normal_(0.0, initial_std(name, parameter, model), generator=generator)
        )


def initial_std(name: str, parameter: Tensor, model: ModelSpec) -> float:
    """Standard deviation of a matrix's initial values."""
    m, inputs = model.width_factor, parameter.shape[-1]
    at_base_width = _standard_std(name, round(inputs / m), round(model.d_model / m), model)
    return at_base_width / math.sqrt(m) if is_hidden(name, parameter) else at_base_width


def _standard_std(name: str, inputs: int, d_model: int, model: ModelSpec) -> float:
    layers, writes = len(model.schedule), name.endswith(("out.weight", "down.weight"))
    match model.init:
        case "gpt2":
            return INIT_STD / math.sqrt(2 * layers) if writes else INIT_STD
        case "mobilellm":
            return INIT_STD
        case "tinyllama":
            return 1 / math.sqrt(d_model) / layers if writes else math.sqrt(0.4 / inputs)


def is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix of a block: under muP those learn at a rate of their own.

    `name` may have prefixes that DDP or torch.compile put before it.
    """
    return parameter.ndim >= 2 and "blocks." in name


def lr_factor(name: str, parameter: Tensor, model: ModelSpec) -> float:
    """What the learning rate is multiplied by for a parameter: 1 without muP."""
    return 1 / model.width_factor if is_hidden(name, parameter) else 1.0
