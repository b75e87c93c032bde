"""Bytes on one GPU at the peak of a training step, part by part."""

from dataclasses import dataclass, fields

import numpy as np

from thriftlm.planning.seconds import BF16, FP32, by_stack, offloads, optimizer_shards
from thriftlm.planning.systems import (
    CHECKPOINTING,
    KERNELS,
    OPTIMIZERS,
    STACKS,
    Floats,
    Systems,
)

SELECTIVE_KEPT = 0.4
"""Of a block's activations that selective checkpointing keeps: every second product, and less of
the rest (torchtitan's op policy, peak memory of its Llama 3.1 8B runs)."""
GATHERED_BLOCKS = 2.0
"""Blocks that fully sharded training holds whole: the one that runs and the one prefetched."""
LOGIT_BYTES = {"eager": 8.0, "fused": 6.0, "compiled": 8.0, "native": 2.0, "thriftlm": 0.0}
"""Per token and vocabulary entry: bf16 logits (2), log-softmax in fp32 (4), bf16 gradient (2); a
fused loss writes the gradient over the logits, llm.c over bf16 ones. Ours holds one block."""
UPCAST_LOGIT_BYTES = 14.0
"""Eager Llama stacks upcast logits first and keep them: two fp32 tensors and an fp32 gradient.
Eager GPT stacks that publish throughput do not: 46 of their rows could not have held it."""
PURE_BF16_LOGIT_BYTES = 6.0
"""Log-softmax in bf16, where nothing is fp32."""
OUR_LOGIT_BLOCK_BYTES = 64 * 2.0**20
"""`thriftlm_models.loss.LOGIT_BLOCK_BYTES`, which planning may not import: it needs torch."""
SCORE_BYTES = 6.0
"""Kept by `math` attention per score: softmax in fp32 and its bf16 copy."""
ADAMW_8BIT_BYTES = 2 * (1 + 4 / 256)
"""Of both moments per parameter: a byte each, and an fp32 scale per 256 (torchao AdamW8bit)."""
FRAMEWORK_BYTES = 1.0e9
"""CUDA context, NCCL channels and cuBLAS workspaces: about 1 GB beside what torch allocates."""
CPU_FRAMEWORK_BYTES = 0.4e9
"""Of a worker on a CPU: the resident set of a process that has imported torch and our core."""
DEEPSPEED_BYTES = 0.4e9
"""On top of it DeepSpeed with its buckets (data/own_throughput.csv, zero1 to 3 beside ddp)."""
FRAGMENTED_FRACTION = 0.03
"""Of what torch allocates that its allocator reserves and cannot use."""


@dataclass(frozen=True, eq=False)
class Memory:
    """Bytes on one GPU: `peak` is what torch reports, `needed` adds what it does not."""

    weights: Floats
    """Parameters in the precision in which they are stored, the part held here."""
    masters: Floats
    """A second copy of them that DeepSpeed's optimizer keeps."""
    weight_copies: Floats
    """Gathered blocks of sharded training, or bf16 copies that autocast keeps for backward."""
    gradients: Floats
    optimizer: Floats
    """Two moments."""
    norms: Floats
    """Activations kept for backward: residual stream and norms."""
    attention: Floats
    """Queries, keys, values and what attention gives."""
    scores: Floats
    """Of `math` attention."""
    feed_forward: Floats
    recomputing: Floats
    """The one block that checkpointing has run again."""
    logits: Floats
    buffers: Floats
    """Gradients in flight."""
    framework: Floats
    """Beside what torch allocates."""

    @property
    def peak(self) -> Floats:
        """What torch allocates at most."""
        parts = [getattr(self, field.name) for field in fields(self) if field.name != "framework"]
        return np.asarray(sum(parts, np.zeros_like(self.weights)))

    @property
    def needed(self) -> Floats:
        """What the GPU must have."""
        return self.peak + self.framework


def memory(s: Systems) -> Memory:
    """Bytes on one GPU of each system at the peak of a step."""
    states = _states(s)
    kept = _activations(s)
    share = np.array(
        [{"none": 1.0, "selective": SELECTIVE_KEPT}.get(k, 0.0) for k in CHECKPOINTING]
    )
    checkpointed = s.act_ckpt != CHECKPOINTING.index("none")
    whole = sum(kept.values(), np.zeros(len(s)))
    inputs = np.where(checkpointed, s.tokens * s.d_model * _size(s) * s.layers, 0.0)
    activations = {name: value * share[s.act_ckpt] for name, value in kept.items()}
    activations["norms"] = activations["norms"] + inputs
    found = states | activations
    allocated = sum(found.values(), np.zeros(len(s)))
    recomputing = np.where(checkpointed, whole / s.layers, 0.0)
    logits = _logits(s)
    allocated = allocated + recomputing + logits
    return Memory(
        **found,
        recomputing=recomputing,
        logits=logits,
        framework=_framework(s) + FRAGMENTED_FRACTION * allocated,
    )


def _framework(s: Systems) -> Floats:
    deepspeed = np.where(s.uses("zero1", "zero2", "zero3"), DEEPSPEED_BYTES, 0.0)
    return np.where(s.on_cpu > 0, CPU_FRAMEWORK_BYTES + deepspeed, FRAMEWORK_BYTES)


def _size(s: Systems) -> Floats:
    """Bytes of a value in the precision of the products."""
    return np.where(s.fp32 > 0, FP32, BF16)


def _stored(s: Systems) -> Floats:
    """Bytes of a parameter as it is stored."""
    return np.where((s.fp32_masters > 0) | (s.fp32 > 0), FP32, BF16)


def _states(s: Systems) -> dict[str, Floats]:
    stored = _stored(s) * s.stored_params
    shards = optimizer_shards(s)
    sharded = s.uses("fsdp_full", "fsdp_grad_op", "hsdp", "zero3")
    held = {
        "weights": stored / np.where(sharded, shards, 1.0),
        "masters": np.where(s.uses("zero1", "zero2", "zero3"), stored / shards, 0.0),
        "weight_copies": _weight_copies(s),
        "gradients": stored / np.where(sharded | s.uses("zero2"), shards, 1.0),
        "optimizer": _optimizer(s, stored) / shards,
        "buffers": _buffers(s, stored),
    }
    away = offloads(s)
    elsewhere = {
        "weights": away & sharded,
        "masters": away,
        "gradients": away & (sharded | s.uses("zero2")),
        "optimizer": away,
    }
    return held | {name: np.where(where, 0.0, held[name]) for name, where in elsewhere.items()}


def _optimizer(s: Systems, stored: Floats) -> Floats:
    """Moments: two values a parameter for AdamW, one for Muon's matrices and for sgd."""
    matrices = s.stored_layers * s.block_matmul_params / s.stored_params
    values = np.choose(s.optimizer, [2.0, 0.0, 2.0 - matrices, 1.0])
    bytes_8bit = np.where(s.optimizer == OPTIMIZERS.index("adamw_8bit"), ADAMW_8BIT_BYTES, 0.0)
    return values * stored + bytes_8bit * s.stored_params


def _block_params(s: Systems) -> Floats:
    embeddings = s.vocab * s.d_model * (2 - s.tied)
    return (s.stored_params - embeddings) / s.stored_layers


def _weight_copies(s: Systems) -> Floats:
    embeddings = s.vocab * s.d_model * (2 - s.tied)
    gathered = (GATHERED_BLOCKS * _block_params(s) + embeddings) * _size(s)
    whole = s.stored_params * _size(s)
    cast = np.where((s.fp32_masters > 0) & (s.fp32 == 0), s.stored_params * BF16, 0.0)
    full = s.uses("fsdp_full", "zero3", "hsdp")
    sharded = np.where(full, np.minimum(gathered, whole), whole)
    return np.where(full | s.uses("fsdp_grad_op"), sharded, cast)


def _buffers(s: Systems, stored: Floats) -> Floats:
    """DDP of an eager stack copies gradients into buckets; sharded training reduces a block."""
    copied = np.where(s.uses("ddp") & (s.stack == STACKS.index("eager")), stored, 0.0)
    block = _block_params(s) * np.where(s.reduces_in_fp32 > 0, FP32, BF16)
    return copied + np.where(
        s.uses("fsdp_full", "fsdp_grad_op", "hsdp", "zero2", "zero3"), block, 0
    )


def _activations(s: Systems) -> dict[str, Floats]:
    """Bytes kept for backward by all executed layers without checkpointing."""
    size, per_layer = _size(s), s.tokens * s.layers
    eager = (s.stack == STACKS.index("eager")) & (s.gated > 0)
    # Eager RMSNorm keeps its input in fp32, the normalised value and the scaled one.
    norm_values = np.where(eager, 2 * (1 + FP32 / size + 1), 4.0) * s.d_model
    query, kv = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim
    # Eager stacks expand keys and values to one per query head.
    attention = np.where(eager, 4 * query, 2 * query + 2 * kv)
    keeps_gate_apart = np.isin(s.stack, [STACKS.index("eager"), STACKS.index("thriftlm")])
    gated = np.where(keeps_gate_apart, 4, 3)
    scores = s.micro_batch * s.n_heads * s.seq_len**2 * s.layers
    kept = np.where(s.fp32 > 0, FP32, SCORE_BYTES)
    return {
        "norms": norm_values * size * per_layer,
        "attention": attention * size * per_layer,
        "scores": np.where(s.kernel == KERNELS.index("math"), kept * scores, 0.0),
        "feed_forward": np.where(s.gated > 0, gated, 2) * s.d_ff * size * per_layer,
    }


def _logits(s: Systems) -> Floats:
    each = by_stack(s, LOGIT_BYTES)
    pure = (s.fp32_masters == 0) & (s.fp32 == 0)
    upcasts = (s.stack == STACKS.index("eager")) & (s.gated > 0)
    each = np.where(upcasts, UPCAST_LOGIT_BYTES, each)
    held = np.where(pure, np.minimum(each, PURE_BF16_LOGIT_BYTES), each) * s.tokens * s.vocab
    block = np.minimum(OUR_LOGIT_BLOCK_BYTES, s.tokens * s.vocab * FP32)
    ours = 4 * block + s.vocab * s.d_model * FP32
    return np.where(s.stack == STACKS.index("thriftlm"), ours, held)
