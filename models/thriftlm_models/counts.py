"""What a decoder costs to hold and to run: parameters, FLOPs, cache bytes. No torch here."""

from thriftlm_models.config import GATED, ModelSpec

FLOP_FORMULA = "6N+attn"
"""Name under which every FLOP count and MFU of this package is stored."""


def block_matmul_params(model: ModelSpec, block: int) -> int:
    """Parameters of one distinct block that take part in matrix products."""
    feed_forward = (3 if model.activation in GATED else 2) * model.d_model * model.d_ff
    if model.block_attention[block] == "none":
        return feed_forward
    heads = 2 * model.n_heads + 2 * model.n_kv_heads  # queries and output, keys and values
    return model.d_model * heads * model.head_dim + feed_forward


def block_params(model: ModelSpec, block: int) -> int:
    """Parameters of one distinct block, with its norms and biases."""
    attends = model.block_attention[block] != "none"
    norms = (2 if model.post_norm else 1) * (2 if attends else 1) * norm_params(model)
    if attends and model.qk_norm == "learned":
        norms += 2 * model.head_dim
    return block_matmul_params(model, block) + norms + _biases(model, attends)


def norm_params(model: ModelSpec) -> int:
    """Parameters of one norm over the width: gains, and LayerNorm's biases."""
    return model.d_model * (2 if model.norm == "layer" else 1)


def _biases(model: ModelSpec, attends: bool) -> int:
    if not model.bias:
        return 0
    feed_forward = (2 if model.activation in GATED else 1) * model.d_ff + model.d_model
    attention = (model.n_heads + 2 * model.n_kv_heads) * model.head_dim + model.d_model
    return feed_forward + (attention if attends else 0)


def embedding_params(model: ModelSpec) -> int:
    """Parameters of the embedding table, of an output head of its own, and of learned positions."""
    tables = model.vocab * (1 if model.tie_embeddings else 2)
    if model.positions == "learned":
        tables += model.max_positions or 0
    return tables * model.d_model


def stored_params(model: ModelSpec) -> int:
    """Parameters that memory, checkpoints and the optimizer hold: shared blocks count once."""
    blocks = sum(block_params(model, block) for block in range(model.n_layers))
    return blocks + norm_params(model) + embedding_params(model)


def matrix_params(model: ModelSpec) -> int:
    """Stored parameters without norms and biases: what MobileLLM's tables print."""
    blocks = sum(block_matmul_params(model, block) for block in range(model.n_layers))
    return blocks + embedding_params(model)


def applied_params(model: ModelSpec) -> int:
    """Parameters as the forward pass applies them: a shared block counts each time it runs."""
    blocks = sum(block_params(model, block) for block in model.schedule)
    return blocks + norm_params(model) + embedding_params(model)


def non_embedding_params(model: ModelSpec) -> int:
    """Stored parameters without embedding, output head and positions: the N of scaling laws."""
    return stored_params(model) - embedding_params(model)


def flops_per_token(model: ModelSpec, seq_len: int) -> int:
    """Training FLOPs per token, forward and backward, by the formula named `6N+attn`.

    6 x (applied matmul parameters, output head included, input embedding excluded)
    + 12 x heads x head_dim x span, summed over executed layers. The span is `seq_len` in a layer
    with full attention (not halved for causal attention), at most `window` in a sliding one, and 0
    in one without attention. What a kernel computes and masks away does not count.
    TinyLlama's published 56% on A100 is this formula (56.3% at 24k tokens/s).
    """
    spans = {"full": seq_len, "sliding": min(model.window or seq_len, seq_len), "none": 0}
    by_block = [
        6 * block_matmul_params(model, block) + 12 * model.n_heads * model.head_dim * spans[kind]
        for block, kind in enumerate(model.block_attention)
    ]
    return sum(by_block[block] for block in model.schedule) + 6 * model.vocab * model.d_model


def kv_bytes_per_token(model: ModelSpec, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values cached per token, within the window of sliding layers.

    Every executed layer that attends has a slot of its own, shared blocks included.
    """
    slots = sum(model.block_attention[block] != "none" for block in model.schedule)
    return 2 * slots * model.n_kv_heads * model.head_dim * bytes_per_value
