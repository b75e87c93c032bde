"""Published facts that an estimate must get right, and invariants of its parts."""

from dataclasses import fields

import numpy as np
import pytest

from thriftlm.planning.cases import Case, model_columns
from thriftlm.planning.estimate import estimate, estimate_cases, estimate_table
from thriftlm.planning.seconds import newton_schulz_flops, volumes
from thriftlm.planning.systems import from_table
from thriftlm.spec import InputError, SystemSpec
from thriftlm_models.config import ModelSpec
from thriftlm_models.counts import flops_per_token, stored_params

TINY = ModelSpec(preset="tinyllama-1.1b")


def tinyllama(micro_batch, **changes):
    system = SystemSpec(
        gpu="A100-40GB",
        n_gpus=16,
        strategy="fsdp_full",
        micro_batch=micro_batch,
        precision="amp_bf16",
        **changes,
    )
    return estimate(TINY, system, 2048, 2**21, stack="fused")


def rows(n=1, **columns):
    base = model_columns(TINY, 2048) | {
        "gpu": "A100-80GB",
        "n_gpus": 8,
        "strategy": "fsdp_full",
        "micro_batch": 8,
        "precision": "amp_bf16",
        "stack": "fused",
    }
    length = max([n, *(len(c) for c in columns.values() if isinstance(c, list))])
    filled = base | columns
    return {k: v if isinstance(v, list) else [v] * length for k, v in filled.items()}


def test_tinyllama_on_sixteen_a100_40gb():
    # facts.md 3.3: 24k tokens/s per GPU at 56% MFU with 16k tokens per GPU, no checkpointing.
    found = tinyllama(8)
    assert found.tokens_per_s_per_gpu == pytest.approx(24_000, rel=0.15)
    assert found.mfu == pytest.approx(0.56, rel=0.15)
    assert found.fits
    twice = tinyllama(16)
    assert not twice.fits
    assert twice.reason == "needs 53 GB of 43"
    assert found.low < 24_000 < found.high


def test_mfu_is_the_formula_it_names():
    found = tinyllama(8)
    by_hand = found.tokens_per_s_per_gpu * flops_per_token(TINY, 2048) / 312e12
    assert found.mfu_formula == "6N+attn"
    assert found.mfu == pytest.approx(by_hand, rel=1e-9)


def test_parts_sum_to_the_step_and_to_the_memory():
    system = SystemSpec(gpu="H100", n_gpus=8, strategy="zero1", micro_batch=4)
    found = estimate_cases([Case(TINY, system, 2048, 2**19)])
    one = found[0]
    parts = {k: v for k, v in one.seconds.items() if k != "communication"}
    assert sum(parts.values()) == pytest.approx(found.seconds.step[0])
    step_tokens = 8 * 4 * 2048 * (2**19 // (8 * 4 * 2048))
    assert one.tokens_per_s_per_gpu * 8 == pytest.approx(step_tokens / sum(parts.values()))
    torch_sees = {k: v for k, v in one.memory_gb.items() if k != "framework"}
    assert sum(torch_sees.values()) == pytest.approx(one.peak_mem_gb)


def test_estimate_is_a_batch_of_one():
    pairs = [
        (ModelSpec(preset=name), SystemSpec(gpu=gpu, micro_batch=mb, precision="amp_bf16"))
        for name in ("apple-100m", "mobilellm-ls-125m", "gemma-3-270m")
        for gpu, mb in (("A100-40GB", 4), ("L4", 8), ("RTX4090", 2))
    ]
    batch = estimate_cases([Case(model, system, 1024, 2**17) for model, system in pairs])
    for i, (model, system) in enumerate(pairs):
        assert batch[i] == estimate(model, system, 1024, 2**17)


def test_sharing_leaves_time_of_products_alone_and_shrinks_bytes():
    fields_of = {"n_heads": 9, "d_model": 576, "vocab": 32_000}
    whole = ModelSpec(n_layers=30, **fields_of)
    shared = ModelSpec(n_layers=15, sharing="immediate", repeats=2, **fields_of)
    system = SystemSpec(gpu="A100-40GB", precision="amp_bf16")
    a, b = (estimate(m, system, 2048, 2**17) for m in (whole, shared))
    assert a.seconds["matmul"] == pytest.approx(b.seconds["matmul"])
    assert a.seconds["attention"] == pytest.approx(b.seconds["attention"])
    assert a.memory_gb["feed_forward"] == pytest.approx(b.memory_gb["feed_forward"])
    ratio = stored_params(shared) / stored_params(whole)
    for part in ("weights", "gradients", "optimizer"):
        assert b.memory_gb[part] / a.memory_gb[part] == pytest.approx(ratio)


def test_windows_shorten_attention():
    shape = {"n_layers": 8, "n_heads": 8, "d_model": 512, "vocab": 32_000}
    full = ModelSpec(**shape)
    sliding = ModelSpec(**shape, attention_pattern=("sliding",), window=512)
    system = SystemSpec(gpu="A100-40GB", precision="amp_bf16")
    a, b = (estimate(m, system, 4096, 2**17) for m in (full, sliding))
    assert b.seconds["attention"] == pytest.approx(a.seconds["attention"] / 8)
    assert b.seconds["matmul"] == pytest.approx(a.seconds["matmul"])


@pytest.mark.parametrize("strategy", ["fsdp_full", "zero1", "zero2", "zero3"])
def test_offloaded_state_leaves_the_gpu_and_costs_time(strategy):
    on_gpu, on_host = (
        estimate_table(rows(strategy=strategy, stack="thriftlm", cpu_offload=word))
        for word in ("no", "yes")
    )
    assert on_host.memory.optimizer[0] == on_host.memory.masters[0] == 0
    assert on_host.memory.weights[0] == (
        0 if strategy.endswith(("full", "3")) else on_gpu.memory.weights[0]
    )
    assert on_host.seconds.step[0] > 1.05 * on_gpu.seconds.step[0]
    # By hand: AdamW's 28 bytes a parameter over 8 GPUs at an assumed 20 GB/s of host memory.
    assert on_host.seconds.optimizer[0] == pytest.approx(28 * stored_params(TINY) / 8 / 20e9)


def test_compiled_blocks_of_our_own_move_less_and_launch_less():
    plain, compiled = (
        estimate_table(rows(stack="thriftlm", compiled=word)).seconds for word in ("no", "yes")
    )
    assert compiled.elementwise[0] < plain.elementwise[0]
    assert compiled.matmul[0] == plain.matmul[0]
    assert compiled.logits[0] == plain.logits[0]


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [
        ("ddp", 4, 4, 8),
        ("zero1", 4, 4, 8 / 8),
        ("zero2", 4, 4 / 8, 8 / 8),
        ("zero3", 4 / 8, 4 / 8, 8 / 8),
        ("fsdp_full", 4 / 8, 4 / 8, 8 / 8),
        ("fsdp_grad_op", 4 / 8, 4 / 8, 8 / 8),
        ("hsdp", 4 / 8, 4 / 8, 8 / 8),
    ],
)
def test_bytes_per_parameter_of_each_strategy(strategy, weights, gradients, optimizer):
    # ZeRO (arXiv 1910.02054, Figure 1) with fp32 parameters: 4 + 4 + 8 bytes, each over 8 GPUs or
    # not. fsdp_grad_op keeps the bf16 weights whole beside its fp32 shard.
    held = estimate_table(rows(strategy=strategy)).memory
    params = stored_params(TINY)
    assert held.weights[0] / params == pytest.approx(weights)
    assert held.gradients[0] / params == pytest.approx(gradients)
    assert held.optimizer[0] / params == pytest.approx(optimizer)
    if strategy == "fsdp_grad_op":
        assert held.weight_copies[0] / params == pytest.approx(2)


def test_pure_bf16_halves_the_states():
    masters, pure = (
        estimate_table(rows(strategy="ddp", master_weights=m)).memory for m in ("fp32", "bf16")
    )
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(pure, part)[0] == pytest.approx(getattr(masters, part)[0] / 2)


def test_hsdp_shards_within_the_node_only():
    table = rows(strategy=["hsdp", "fsdp_full"], n_gpus=32, gpus_per_node=4)
    held = estimate_table(table).memory
    assert held.optimizer[0] == pytest.approx(8 * held.optimizer[1])


def test_ring_volumes():
    # Per pass: fully sharded gathers weights twice and scatters gradients, grad_op gathers once.
    # Per step: DDP reduces gradients, which is a scatter and a gather.
    table = rows(strategy=["fsdp_full", "fsdp_grad_op", "ddp", "zero2", "zero1"])
    each, once, _ = volumes(from_table(table))
    params = stored_params(TINY)
    assert each / params == pytest.approx([2 * 2 + 4, 2 + 4, 0, 4, 0])
    assert once / params == pytest.approx([0, 0, 2 * 4, 2, 4 + 2])


def test_checkpointing_trades_time_for_activations():
    found = estimate_table(rows(act_ckpt=["none", "selective", "full"]))
    activations = found.memory.norms + found.memory.attention + found.memory.feed_forward
    assert (np.diff(activations) < 0).all()
    assert (np.diff(found.seconds.compute) > 0).all()
    # One more forward pass of the blocks: a third of their products.
    assert 1.25 < found.seconds.matmul[2] / found.seconds.matmul[0] < 1 + 1 / 3


def test_accumulation_spreads_what_is_paid_once_per_step():
    found = estimate_table(rows(strategy="ddp", grad_accum=[1, 16], internode_gbps=50, n_gpus=16))
    assert found.tokens_per_s_per_gpu[1] > found.tokens_per_s_per_gpu[0]
    assert found.memory.peak[1] == found.memory.peak[0]


def test_better_hardware_is_never_slower():
    base = estimate_table(rows()).seconds.step[0]
    for column, values in {
        "internode_gbps": [100, 400],
        "attention_version": ["fa1", "fa2"],
        "stack": ["eager", "compiled"],
        "gpu": ["A100-80GB", "H100-80GB"],
    }.items():
        slow, fast = estimate_table(rows(**{"n_gpus": 16, column: values})).seconds.step
        assert fast <= slow, column
    assert base > 0


def test_math_attention_keeps_scores_and_flash_does_not():
    found = estimate_table(rows(attention=["math", "flash"]))
    assert found.memory.scores[1] == 0
    scores = 8 * TINY.n_heads * 2048**2 * TINY.n_layers
    assert found.memory.scores[0] == pytest.approx(6 * scores)


def test_unknown_is_absent_and_never_zero():
    cpu = estimate(TINY, SystemSpec(gpu="cpu"), 2048, 2**17)
    assert cpu.tokens_per_s_per_gpu is cpu.mfu is cpu.fits is None
    assert "thriftlm doctor" in cpu.reason
    assert cpu.peak_mem_gb > 0
    small, volta = ModelSpec(preset="apple-100m"), {"gpu": "V100-32GB", "micro_batch": 4}
    no_bf16 = estimate(small, SystemSpec(precision="amp_bf16", **volta), 1024, 2**17)
    assert no_bf16.tokens_per_s_per_gpu is None
    assert (no_bf16.fits, no_bf16.reason) == (True, "no bf16 peak is known")
    fp32 = estimate(small, SystemSpec(**volta), 1024, 2**17)  # 15.7 TFLOP/s, dense fp32
    assert fp32.tokens_per_s_per_gpu * flops_per_token(small, 1024) < 15.7e12
    shapeless = estimate_table(rows(d_model="", n_layers=""))[0]
    assert shapeless.tokens_per_s_per_gpu is shapeless.peak_mem_gb is None
    nowhere = estimate(TINY, SystemSpec(gpu="RTX5090"), 2048, 2**17)  # aws has none
    assert nowhere.usd_per_btok is None
    assert nowhere.tokens_per_s_per_gpu > 0


def test_empty_cells_take_what_the_page_says():
    told = rows(n_kv_heads="", head_dim="", grad_accum="", act_ckpt="", attention="")
    full = rows(n_kv_heads=32, head_dim=64, grad_accum=4, act_ckpt="none", attention="flash")
    got, want = (estimate_table(t).seconds.attention for t in (told, full))
    np.testing.assert_array_equal(got, want)


def test_dollars_are_those_of_the_nodes_that_are_paid():
    # p4d.24xlarge, 21.957642 USD/h, comes only with eight GPUs: two cost as much as eight.
    found = estimate_table(rows(gpu="A100-40GB", n_gpus=[2, 8], strategy="ddp", stack="fused"))
    for i, n in enumerate((2, 8)):
        tokens_per_hour = found.tokens_per_s_per_gpu[i] * n * 3600
        assert found.usd_per_btok[i] == pytest.approx(21.957642 * 1e9 / tokens_per_hour)
    shared = estimate_table(rows(gpu="A100-40GB", n_gpus=2, strategy="ddp", billing="pro_rata"))
    assert shared.usd_per_btok[0] == pytest.approx(found.usd_per_btok[0] / 4)
    assert found.instance[0] == "p4d.24xlarge"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("gpu", "A1000", "did you mean"),
        ("strategy", "fsdp", "strategy: unknown 'fsdp'; known: single, ddp"),
        ("stack", "jax", "stack: unknown 'jax'"),
        ("micro_batch", "many", "micro_batch must hold numbers"),
        ("cloud", "awz", "unknown cloud 'awz'; did you mean 'aws'?"),
    ],
)
def test_bad_cells_are_named(column, value, message):
    with pytest.raises(InputError) as error:
        estimate_table(rows(**{column: value}))
    assert message in str(error.value)


def test_optimizers_hold_and_move_what_they_say():
    found = estimate_table(rows(optimizer=["adamw", "adamw_8bit", "muon", "sgd"], n_gpus=1))
    whole = found.memory.optimizer / stored_params(TINY)
    embeddings = 2 * 32_000 * 2048 / stored_params(TINY)
    assert whole == pytest.approx([8, 2 * (1 + 4 / 256), 4 + 4 * embeddings, 4], rel=1e-3)
    adamw, small, muon, sgd = found.seconds.optimizer
    assert small < sgd < adamw
    assert muon > sgd  # the same traffic, and Newton-Schulz products


def test_newton_schulz_by_hand():
    # One layer, heads and feed-forward as wide as the model: 4 + 3 square matrices.
    d, flops = 512, 5 * 7 * (4 + 2) * 512**3
    table = rows(d_model=d, d_ff=d, n_heads=8, n_kv_heads=8, head_dim=64, n_layers=1)
    table |= {"stored_layers": [1], "n_gpus": [1]}
    assert newton_schulz_flops(from_table(table))[0] == flops


def test_fp8_doubles_products_of_blocks_where_there_is_fp8():
    gpus = ["H100-80GB", "RTX4090", "A100-80GB"]
    fp8, bf16 = (estimate_table(rows(gpu=gpus, precision=p)) for p in ("fp8", "amp_bf16"))
    head = 3 * 32_000 * 2048
    block = fp8.systems.layers * fp8.systems.block_matmul_params * 3
    expected = (block / 2 + head) / (block + head)
    assert (fp8.seconds.matmul / bf16.seconds.matmul)[:2] == pytest.approx(expected[:2])
    assert np.isnan(fp8.tokens_per_s_per_gpu[2])
    assert fp8[2].reason == "this GPU has no fp8 arithmetic"
    assert set(fp8.interval_class) == {"optimistic_fp8"}
    np.testing.assert_array_equal(fp8.peak_mem_gb, bf16.peak_mem_gb)


def test_every_part_is_finite_and_not_negative_over_a_wide_grid():
    rng = np.random.default_rng(0)
    n = 2000
    pick = {
        "strategy": [
            "single",
            "ddp",
            "fsdp_full",
            "fsdp_grad_op",
            "hsdp",
            "zero1",
            "zero2",
            "zero3",
        ],
        "act_ckpt": ["none", "selective", "full"],
        "stack": ["eager", "fused", "compiled", "native", "thriftlm"],
        "attention": ["math", "flash", "fa3"],
        "precision": ["bf16", "amp_bf16", "bf16_true", "fp32"],
        "optimizer": ["adamw", "adamw_8bit", "muon", "sgd"],
        "gpu": ["A100-40GB", "H100-80GB", "RTX4090", "L4-24GB", "A40", "GH200", "B200-180GB"],
        "n_gpus": [1, 2, 8, 64, 1024],
        "micro_batch": [1, 8, 64],
    }
    table = rows(n) | {k: [str(x) for x in rng.choice(v, n)] for k, v in pick.items()}
    found = estimate_table(table)
    for record in (found.seconds, found.memory):
        for field in fields(record):
            values = getattr(record, field.name)
            assert np.isfinite(values).all(), field.name
            assert (values >= 0).all(), field.name
    assert (found.mfu < 1).all()
    assert (found.low < found.tokens_per_s_per_gpu).all()
