"""Errors of estimated tokens/s on the published rows, beside three baselines, as Markdown.

    python tests/benchmarks/estimate_accuracy.py > tests/benchmarks/results/estimate_accuracy.md

The third baseline needs `pip install llm-analysis==0.2.2` and is left out where it is missing. It
gets the same peaks, bandwidths, networks and shapes; its efficiency is one number, 1.0 by default.
"""

import contextlib
import io
import logging

import numpy as np

from thriftlm import catalog
from thriftlm.planning import calibration
from thriftlm.planning.systems import from_table

STAGES = {"zero1": 1, "fsdp_grad_op": 2, "zero2": 2, "fsdp_full": 3, "hsdp": 3, "zero3": 3}


def llm_analysis_tokens_per_s(table, systems, efficiency):
    """Tokens per second and GPU of each row by llm-analysis."""
    from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis
    from llm_analysis.config import GPUConfig, ModelConfig, ParallelismConfig

    found = np.empty(len(systems))
    for i in range(len(systems)):
        card = catalog.gpu(table["gpu"][i])
        model = ModelConfig(
            name=table["model"][i],
            num_layers=int(systems.layers[i]),
            n_head=int(systems.n_heads[i]),
            hidden_dim=int(systems.d_model[i]),
            vocab_size=int(systems.vocab[i]),
            max_seq_len=int(systems.seq_len[i]),
            num_key_value_heads=int(systems.n_kv_heads[i]),
            ffn_embed_dim=int(systems.d_ff[i]),
            expansion_ratio=systems.d_ff[i] / systems.d_model[i],
        )
        gpu = GPUConfig(
            name=card.id,
            mem_per_GPU_in_GB=1e6,  # it refuses what it thinks does not fit
            hbm_bandwidth_in_GB_per_sec=card.memory_gb_per_s,
            intra_node_bandwidth_in_GB_per_sec=(card.nvlink_gb_per_s or 64) / 2,
            intra_node_min_message_latency=8e-6,
            peak_fp16_TFLOPS=card.bf16_tflops,
            inter_node_bandwidth_in_GB_per_sec=systems.node_bytes_per_s[i] / 1e9,
        )
        analysis = LLMAnalysis(
            model,
            gpu,
            parallelism_config=ParallelismConfig(dp_size=int(systems.n_gpus[i])),
            flops_efficiency=efficiency,
            hbm_memory_efficiency=0.9,
        )
        recomputed = "FULL" if table["act_ckpt"][i] == "full" else "NONE"
        with contextlib.redirect_stdout(io.StringIO()):
            told = analysis.training(
                batch_size_per_gpu=int(systems.micro_batch[i]),
                gradient_accumulation_steps=int(systems.grad_accum[i]),
                seq_len=int(systems.seq_len[i]),
                activation_recomputation=ActivationRecomputation[recomputed],
                ds_zero=DSZeRO(STAGES.get(table["strategy"][i], 0)),
                mlp_gated_linear_units=bool(systems.gated[i]),
            )
        found[i] = systems.tokens[i] * systems.grad_accum[i] / told["latency_per_iter"]
    return found


def main():
    table = calibration.read_rows()
    report = calibration.report(table)
    table = calibration.published(table)
    systems = from_table(table)
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ImportError):
        measured = calibration.measured_tokens_per_s(table, systems)
        for efficiency in (1.0, 0.5):
            speed = llm_analysis_tokens_per_s(table, systems, efficiency)
            line = calibration.accuracy(np.log(speed / measured))
            report[f"llm-analysis 0.2.2, flops_efficiency {efficiency}"] = [line]
    print("# Error of estimated tokens/s on 191 published rows and 20 of our own\n")
    print("By `tests/benchmarks/estimate_accuracy.py`. Bias above 0: estimates are too fast.")
    for title, lines in report.items():
        print(f"\n## {title}\n\n| group | rows | median | p90 | bias |\n|---|---|---|---|---|")
        for line in lines:
            cells = f"{line.median:.1%} | {line.p90:.1%} | {line.bias:+.1%}"
            print(f"| {line.group} | {line.n_rows} | {cells} |")


if __name__ == "__main__":
    main()
