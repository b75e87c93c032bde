"""Seconds of a training step, part by part, from shapes, hardware and calibrated constants."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thriftlm.planning.constants import Constants
from thriftlm.planning.systems import (
    CHECKPOINTING,
    FP8_CAPABILITY,
    KERNELS,
    OPTIMIZERS,
    STACKS,
    Floats,
    Systems,
)

BF16, FP32 = 2.0, 4.0

SELECTIVE_RECOMPUTED = 0.4
"""Of a block's forward pass that selective checkpointing runs again: torchtitan's op policy saves
every second product (docs/performance.md: 13% slower than none, where full costs 33%)."""
NVLINK_FRACTION = 0.75
"""Of one direction that NCCL rings reach on NVSwitch (nccl-tests: 230 of 300 GB/s on A100)."""
PCIE_FRACTION = 0.4
"""Of one direction that rings through host memory reach without peer access (consumer cards)."""
HOPPER_OLD_KERNEL = 0.62
"""Of Hopper's peak that Ampere's tensor instructions reach: FlashAttention-2 runs at 35 to 40% on
H100 where it reaches 60 to 70% on A100 (arXiv 2407.08608, Figure 5)."""
FA3_FRACTION = 0.65
"""Of the bf16 peak in FlashAttention-3 on Hopper (arXiv 2407.08608: 550 to 740 TFLOP/s forward)."""
NARROW_HEAD = 0.85
"""Speed of flash kernels with heads of 64 over heads of 128 (arXiv 2307.08691, Figure 4)."""
FP8_SPEEDUP = 2.0
"""Of products in fp8 over bf16: the ratio of the peaks, with nothing for casts and scales. So an
estimate in fp8 is optimistic: torchtitan's Llama 3.1 8B gains 1.5x on H100, not 1.7."""
HALF_RATE_FRACTION = 0.93
"""Of the bf16 peak in large products where fp32 accumulation runs at half rate: cuBLAS reaches 105
to 115 of 119.5 TFLOP/s on an L20 (DefTruth/CUDA-Learn-Notes, hgemm; read 2026-11-24). Neither
memory nor power holds back tensor cores that wait every other cycle."""
NATIVE_OPERAND_TRAFFIC = 1.0
"""Of stacks without torch: bias and activation in the epilogue of the product, no casts, so each
operand moves once. Not measured: no published row has such a stack."""
LAUNCH_SECONDS = 5e-6
"""CPU time of launching one kernel from eager torch; not identified by published rows."""
KERNELS_PER_LAYER = {
    "eager": 130.0,
    "fused": 70.0,
    "compiled": 60.0,
    "native": 40.0,
    "thriftlm": 90.0,
}
"""Launches of one block, forward and backward, counted in profiles of Llama blocks."""
ADAMW_BYTES = {
    "eager": 48.0,
    "fused": 28.0,
    "compiled": 36.0,
    "native": 28.0,
    "thriftlm": 28.0,
}
"""Memory traffic of an AdamW step per parameter with fp32 state: fused reads parameter, gradient
and two moments and writes three of them (28); unfused kernels come back for some of it."""
OPTIMIZER_BYTES = {"adamw": 28.0, "adamw_8bit": 16.0, "muon": 20.0, "sgd": 20.0}
"""The same of fused kernels by optimizer: one moment instead of two, or two of one byte each."""
NEWTON_SCHULZ_STEPS = 5
"""Of Muon (kellerjordan.github.io/posts/muon); each multiplies an m x n matrix, m the smaller, by
its transpose, squares that, and applies it: 4 m^2 n + 2 m^3 FLOPs."""
SCORE_BYTES = 70.0
"""Memory traffic of `math` attention per score, forward and backward: bf16 scores, mask, fp32
softmax, cast, and their gradients, one kernel each."""
DDP_BUCKET_BYTES = 25e6
HOST_LINK_FRACTION = 0.8
"""Of PCI Express that copies from and to pinned memory reach. Assumed; no row offloads."""
HOST_MEMORY_BYTES_PER_S = 20e9
"""Of a node's memory bandwidth, the share of one GPU's optimizer: eight channels of DDR4-3200 are
205 GB/s for eight GPUs. Assumed; no row offloads."""
GLOO_FRACTION = 0.1
"""Of a worker's share of memory bandwidth that gloo reaches between processes of one machine."""


@dataclass(frozen=True, eq=False)
class Seconds:
    """Of one optimizer step of each system. Their sum is the step, unless launches take longer."""

    matmul: Floats
    operands: Floats
    """Operands of products through memory beyond what arithmetic hides."""
    attention: Floats
    elementwise: Floats
    """Norms, positions, activations, residuals."""
    logits: Floats
    """The loss's traffic."""
    optimizer: Floats
    exposed_communication: Floats
    launch: Floats
    """GPU idle because kernels are launched too slowly."""
    communication: Floats
    """All of it, hidden or not; no part of the sum."""

    @property
    def step(self) -> Floats:
        """One optimizer step."""
        return self.compute + self.optimizer + self.exposed_communication + self.launch

    @property
    def compute(self) -> Floats:
        """Forward and backward."""
        return self.matmul + self.operands + self.attention + self.elementwise + self.logits


def seconds(systems: Systems, constants: Constants) -> Seconds:
    """Seconds of one optimizer step of each system."""
    s, c = systems, constants
    parts = {
        "matmul": matmul_seconds(s, c),
        "operands": operand_seconds(s, c),
        "attention": attention_seconds(s, c),
        "elementwise": elementwise_seconds(s, c),
        "logits": logit_seconds(s, c),
    }
    one_pass = sum(parts.values(), np.zeros(len(s)))
    kernels = np.where(
        ours_compiled(s), KERNELS_PER_LAYER["compiled"], by_stack(s, KERNELS_PER_LAYER)
    )
    launches = kernels * s.layers * LAUNCH_SECONDS * (1 + recomputed(s) / 3)
    launch = np.where(s.on_cpu > 0, launches, np.maximum(0.0, launches - one_pass))
    total, exposed = communication_seconds(s, c, one_pass + launch)
    return Seconds(
        **{name: value * s.grad_accum for name, value in parts.items()},
        optimizer=optimizer_seconds(s, c),
        exposed_communication=exposed,
        launch=launch * s.grad_accum,
        communication=total,
    )


def ours_compiled(s: Systems) -> NDArray[np.bool_]:
    """Where torch.compile runs the blocks of our own stack."""
    return np.asarray((s.compiled > 0) & (s.stack == STACKS.index("thriftlm")))


def by_stack(s: Systems, values: dict[str, float]) -> Floats:
    """A value per stack for each system."""
    return np.array([values[name] for name in STACKS])[s.stack]


def recomputed(s: Systems) -> Floats:
    """Forward passes of the blocks that checkpointing adds."""
    shares = {"none": 0.0, "selective": SELECTIVE_RECOMPUTED, "full": 1.0}
    return np.array([shares[name] for name in CHECKPOINTING])[s.act_ckpt]


def peak(s: Systems) -> Floats:
    """Peak FLOP/s in the precision of the products, those in fp8 left aside."""
    return np.where(s.fp32 > 0, s.fp32_peak_flops, s.peak_flops)


def product_rate(s: Systems, c: Constants) -> Floats:
    """FLOP/s of large products: the achievable fraction of the peak."""
    fraction = np.where(is_hopper(s) > 0, c.matmul_fraction_hopper, c.matmul_fraction_ampere)
    fraction = np.where(s.half_rate > 0, HALF_RATE_FRACTION, fraction)
    return peak(s) * np.where(s.on_cpu > 0, c.matmul_fraction_cpu, fraction)


def is_hopper(s: Systems) -> Floats:
    """1 where tensor cores need the asynchronous instructions of Hopper and its successors."""
    return np.asarray((s.capability >= 9) & (s.capability < 12), float)


def matmul_seconds(s: Systems, c: Constants) -> Floats:
    """Of one pass: products of blocks and head at the achievable fraction of the peak."""
    blocks = (3 + recomputed(s)) * s.layers * s.block_matmul_params
    no_fp8 = ~(s.capability >= FP8_CAPABILITY)
    speedup = np.where(s.fp8 > 0, np.where(no_fp8, np.nan, FP8_SPEEDUP), 1.0)
    return 2 * s.tokens * (blocks / speedup + 3 * s.vocab * s.d_model) / product_rate(s, c)


def operand_seconds(s: Systems, c: Constants) -> Floats:
    """Of one pass: operands and results of products, each through memory once per product."""
    query, kv = s.n_heads * s.head_dim, 2 * s.n_kv_heads * s.head_dim
    inner = (1 + s.gated) * s.d_ff
    per_token = s.d_model + query + kv + query + s.d_model + s.d_model + inner + s.d_ff + s.d_model
    block = s.tokens * per_token + s.block_matmul_params
    head = s.tokens * (s.d_model + s.vocab) + s.vocab * s.d_model
    values = (3 + recomputed(s)) * s.layers * block + 3 * head
    size = np.where(s.fp32 > 0, FP32, BF16)
    native = s.stack == STACKS.index("native")
    each = np.where(native, NATIVE_OPERAND_TRAFFIC, c.operand_traffic)
    return each * values * size / (s.memory_bytes_per_s * c.memory_fraction)


def attention_seconds(s: Systems, c: Constants) -> Floats:
    """Of one pass: causal scores and their use, by kernel. `math` computes the masked half too."""
    passes = 3.5 + recomputed(s)  # backward of flash is 2.5 forwards: scores are made again
    causal = 2 * s.tokens * s.span_tokens * s.n_heads * s.head_dim * s.layers
    hopper = np.where(is_hopper(s) > 0, HOPPER_OLD_KERNEL, 1.0)
    fa2 = c.attention_fraction * hopper
    fa3 = np.where(is_hopper(s) > 0, FA3_FRACTION, c.attention_fraction)
    fraction = np.choose(s.kernel, [fa2, c.older_attention * fa2, fa2, fa3])
    fraction = np.where(s.on_cpu > 0, c.attention_fraction_cpu, fraction)
    narrow = np.where((s.head_dim < 96) & (s.on_cpu == 0), NARROW_HEAD, 1.0)
    # torch's CPU kernel takes as long in bf16 as in fp32: softmax and products meet in fp32.
    rate = np.where(s.on_cpu > 0, s.fp32_peak_flops, peak(s))
    flash = passes * causal / (rate * fraction * narrow)
    scores = s.tokens * s.seq_len * s.n_heads * s.layers
    traffic = SCORE_BYTES * (1 + recomputed(s) / 3) * scores
    math = 2 * flash + traffic / (s.memory_bytes_per_s * c.memory_fraction)
    return np.asarray(np.where(s.kernel == KERNELS.index("math"), math, flash), float)


def elementwise_values(s: Systems) -> Floats:
    """Values that elementwise kernels move per token and block, forward, by stack.

    Eager Llama blocks (gated) pay for an RMSNorm in fp32 of seven kernels, a rotation of five and
    an activation of two. Eager GPT blocks have a fused LayerNorm and no rotation.
    """
    turned = (s.n_heads + s.n_kv_heads) * s.head_dim
    llama = 2 * 17 * s.d_model + 6 * s.d_model + 12 * turned + 5 * s.d_ff
    gpt = 2 * 2 * s.d_model + 6 * s.d_model + 2 * s.d_ff
    eager = np.where(s.gated > 0, llama, gpt)
    fused = 2 * 4 * s.d_model + np.where(s.gated > 0, 2 * turned + 3 * s.d_ff, 2 * s.d_ff)
    ours = 4 * s.d_model + 6 * s.d_model + 6 * turned + (2 + 3 * s.gated) * s.d_ff
    ours = np.where(s.compiled > 0, fused, ours)
    return np.choose(s.stack, [eager, fused, fused, fused, ours])


def elementwise_seconds(s: Systems, c: Constants) -> Floats:
    """Of one pass: backward moves one and a half times what forward does."""
    scale = np.where(s.stack == STACKS.index("eager"), c.eager_traffic, 1.0)
    values = elementwise_values(s) * s.tokens * s.layers * (2.5 + recomputed(s))
    size = np.where(s.fp32 > 0, FP32, BF16)
    return scale * values * size / (s.memory_bytes_per_s * c.memory_fraction)


def logit_seconds(s: Systems, c: Constants) -> Floats:
    """Of one pass: softmax of the logits in fp32 and its gradient, beside the product."""
    traffic = {"eager": 28.0, "fused": 8.0, "compiled": 12.0, "native": 8.0, "thriftlm": 16.0}
    each = by_stack(s, traffic)
    return each * s.tokens * s.vocab / (s.memory_bytes_per_s * c.memory_fraction)


def optimizer_seconds(s: Systems, c: Constants) -> Floats:
    """Of one step: the traffic of the state that this GPU holds."""
    held = s.stored_params / optimizer_shards(s)
    half = np.where(s.fp32_masters > 0, 1.0, 0.5)
    fused = np.array([OPTIMIZER_BYTES[name] for name in OPTIMIZERS])[s.optimizer]
    each = fused * by_stack(s, ADAMW_BYTES) / OPTIMIZER_BYTES["adamw"]
    memory = np.where(
        offloads(s), HOST_MEMORY_BYTES_PER_S, s.memory_bytes_per_s * c.memory_fraction
    )
    moved = each * held * half / memory
    muon = s.optimizer == OPTIMIZERS.index("muon")
    return moved + np.where(muon, newton_schulz_flops(s) / product_rate(s, c), 0.0)


def newton_schulz_flops(s: Systems) -> Floats:
    """Of one step on this GPU, each matrix orthogonalised by one of the GPUs that share state."""
    query, kv = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim
    matrices = [(query, 2.0), (kv, 2.0), (s.d_ff, 2 + s.gated)]
    flops = np.zeros(len(s))
    for width, number in matrices:
        m, n = np.minimum(width, s.d_model), np.maximum(width, s.d_model)
        flops = flops + number * (4 * m**2 * n + 2 * m**3)
    return NEWTON_SCHULZ_STEPS * flops * s.stored_layers / optimizer_shards(s)


def optimizer_shards(s: Systems) -> Floats:
    """Over how many GPUs optimizer state is spread."""
    whole = s.uses("single", "ddp")
    return np.where(whole, 1.0, np.where(s.uses("hsdp"), s.gpus_per_node, s.n_gpus))


def communication_seconds(s: Systems, c: Constants, one_pass: Floats) -> tuple[Floats, Floats]:
    """Of one step: all communication, and what of it computation does not hide."""
    each, once, across = volumes(s)
    many = s.n_gpus > s.gpus_per_node
    inside = s.link_bytes_per_s * np.where(s.has_nvlink > 0, NVLINK_FRACTION, PCIE_FRACTION)
    inside = np.where(s.on_cpu > 0, GLOO_FRACTION * s.memory_bytes_per_s, inside)
    outside = np.minimum(inside, s.node_bytes_per_s * c.internode_fraction)
    ring = np.where(s.uses("hsdp"), s.gpus_per_node, s.n_gpus)
    wide = many & ~s.uses("hsdp")
    speed = np.where(wide, outside, inside)
    spread = (ring - 1) / ring
    hops = np.where(wide, (ring - 1) * c.hop_seconds, 0.0)
    pass_seconds = each * spread / speed + collectives(s) * hops
    step_seconds = once * spread / speed + buckets(s) * hops
    nodes = np.maximum(1.0, s.n_gpus / s.gpus_per_node)
    # Each GPU of a node has its share of the network for the part that it holds.
    shared = s.node_bytes_per_s * c.internode_fraction / s.gpus_per_node
    step_seconds = step_seconds + across * (nodes - 1) / nodes / shared
    hidden_pass = np.minimum(c.overlap_fraction * pass_seconds, one_pass)
    hidden_step = np.minimum(c.overlap_fraction * step_seconds, one_pass * 2 / 3)
    exposed = (pass_seconds - hidden_pass) * s.grad_accum + step_seconds - hidden_step
    host = host_seconds(s)
    return pass_seconds * s.grad_accum + step_seconds + host, exposed + host


def offloads(s: Systems) -> NDArray[np.bool_]:
    """Where sharded state lies in host memory and the GPU has its own."""
    return np.asarray((s.offloads > 0) & (s.on_cpu == 0))


def host_seconds(s: Systems) -> Floats:
    """Of one step: weights and gradients between a GPU and host memory, none of it hidden.

    FSDP and ZeRO-3 fetch their shard for each gathering, FSDP brings gradients back each pass; ZeRO
    brings them back, and its updated weights in, once.
    """
    shard = s.stored_params / optimizer_shards(s) * np.where(s.fp32 > 0, FP32, BF16)
    gradient = shard * np.where((s.fp32_masters > 0) & (s.fp32 == 0), FP32 / BF16, 1.0)
    fetched = shard * (2.0 * s.uses("fsdp_full", "hsdp", "zero3") + s.uses("fsdp_grad_op"))
    each = fetched + gradient * s.uses("fsdp_full", "fsdp_grad_op", "hsdp")
    once = s.uses("zero1", "zero2") * (gradient + shard) + s.uses("zero3") * gradient
    moved = each * s.grad_accum + once
    return np.where(offloads(s), moved / (HOST_LINK_FRACTION * s.host_bytes_per_s), 0.0)


def volumes(s: Systems) -> tuple[Floats, Floats, Floats]:
    """Bytes through a ring per pass and per step, and per step between nodes for what one holds."""
    weights = s.stored_params * np.where(s.fp32 > 0, FP32, BF16)
    whole_gradients = s.stored_params * np.where((s.fp32_masters + s.fp32) > 0, FP32, BF16)
    gradients = s.stored_params * np.where((s.reduces_in_fp32 + s.fp32) > 0, FP32, BF16)
    full = s.uses("fsdp_full", "zero3", "hsdp") * (2 * weights + gradients)
    each = full + s.uses("fsdp_grad_op") * (weights + gradients) + s.uses("zero2") * gradients
    once = s.uses("ddp") * 2 * whole_gradients
    once = once + s.uses("zero1") * (gradients + weights) + s.uses("zero2") * weights
    across = s.uses("hsdp") * 2 * gradients / s.gpus_per_node
    return each, once, across


def collectives(s: Systems) -> Floats:
    """Collectives of one pass: one block is gathered, or its gradients scattered, at a time."""
    per_block = 3.0 * s.uses("fsdp_full", "zero3", "hsdp") + 2.0 * s.uses("fsdp_grad_op")
    return (per_block + s.uses("zero2")) * (s.stored_layers + 1)


def buckets(s: Systems) -> Floats:
    """Collectives of one step: gradients travel in buckets of 25 MB."""
    count = np.ceil(s.stored_params * BF16 / DDP_BUCKET_BYTES)
    return np.where(s.uses("ddp", "zero1", "zero2"), count, 0.0)
