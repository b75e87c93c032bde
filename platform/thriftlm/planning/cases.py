"""Specifications as systems: what the columns say of a model that is trained on a system."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from thriftlm.planning.machine import Machine
from thriftlm.planning.systems import Systems, from_table
from thriftlm.spec import SystemSpec
from thriftlm_models.config import GATED, ModelSpec
from thriftlm_models.counts import block_matmul_params, flops_per_token, stored_params


class Case(NamedTuple):
    """A model trained on a system."""

    model: ModelSpec
    system: SystemSpec
    seq_len: int
    batch_tokens: int
    """Tokens of an optimizer step; gradient accumulation fills it up, by at least one pass."""
    optimizer: str = "adamw"


def from_cases(cases: Sequence[Case], stack: str, machine: Machine | None = None) -> Systems:
    """Systems of specifications trained by one stack; `machine` is what CPU workers run on."""
    shapes = {
        (model, seq_len): model_columns(model, seq_len)
        for model, seq_len in {(case.model, case.seq_len) for case in cases}
    }
    rows = [
        shapes[case.model, case.seq_len] | system_columns(case.system) | batch_columns(case, stack)
        for case in cases
    ]
    return from_table({name: [row[name] for row in rows] for name in rows[0]}, machine)


def batch_columns(case: Case, stack: str) -> dict[str, Any]:
    """Columns that say how a step is put together."""
    per_pass = case.system.micro_batch * case.system.n_gpus * case.seq_len
    accumulated = max(1, round(case.batch_tokens / per_pass))
    return {"grad_accum": accumulated, "stack": stack, "optimizer": case.optimizer}


def model_columns(model: ModelSpec, seq_len: int) -> dict[str, Any]:
    """Columns of one model, counted exactly: sharing, windows, learned positions, biases."""
    flops = flops_per_token(model, seq_len)
    matmul = sum(block_matmul_params(model, block) for block in model.schedule)
    layers, width = len(model.schedule), model.n_heads * model.head_dim
    spans = flops - 6 * matmul - 6 * model.vocab * model.d_model
    return {
        "n_layers": layers,
        "stored_layers": model.n_layers,
        "d_model": model.d_model,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "d_ff": model.d_ff,
        "mlp": "gated" if model.activation in GATED else "plain",
        "vocab": model.vocab,
        "tied_embeddings": "yes" if model.tie_embeddings else "no",
        "seq_len": seq_len,
        "span_tokens": spans / (12 * layers * width),
        "stored_params": stored_params(model),
        "block_matmul_params": matmul / layers,
    }


def system_columns(system: SystemSpec) -> dict[str, Any]:
    """Columns of one system; its stack is said apart."""
    return {
        "gpu": system.gpu,
        "n_gpus": system.n_gpus,
        "gpus_per_node": system.gpus_per_node or "",
        "cpus_per_worker": system.cpus_per_worker,
        "strategy": system.strategy,
        "micro_batch": system.micro_batch,
        "attention": system.attention,
        "act_ckpt": system.act_ckpt,
        "precision": system.precision,
        "compiled": "yes" if system.compile else "no",
        "cpu_offload": "yes" if system.cpu_offload else "no",
    }
