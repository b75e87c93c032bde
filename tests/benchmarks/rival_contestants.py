"""The processes of rival_steps.py: rival_contestants.py NAME TASK.

TASK is JSON: shape, `sequences`, `seq_len`, `threads`, `lr` and `batches` (a .pt file of token
tensors, which everybody reads). A contestant does one optimizer step for every line on stdin and
answers `STEP seconds`; the clock runs from the line to where its own training loop begins the next
step, so that all it does beside the arithmetic counts. It imports nothing of the others.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset


class Turns:
    """Waits for the next line; says how long the step took that began with the last one."""

    def __init__(self) -> None:
        self.begun: float | None = None

    def next(self) -> None:
        if self.begun is not None:
            print(f"STEP {time.perf_counter() - self.begun}", flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        self.begun = time.perf_counter()


def thriftlm(task: dict[str, Any]) -> None:
    """The loop's own step, with its telemetry."""
    from thriftlm.spec import RunSpec
    from thriftlm.training.engine import build_engine
    from thriftlm.training.loop import Decision, Run
    from thriftlm.training.ranks import joined
    from thriftlm.training.telemetry import Interval

    spec = RunSpec.model_validate(
        {
            "model": task["model"],
            "data": {"seq_len": task["seq_len"], "tokenizer": f"bpe:{task['model']['vocab']}"},
            "optim": {
                "batch_tokens": task["sequences"] * task["seq_len"],
                "schedule": "constant",
                "lr": task["lr"],
            },
            "system": {
                "micro_batch": task["sequences"],
                "precision": "amp_bf16",
                "cpus_per_worker": task["threads"],
                "compile": task["compile"],
            },
            "tokens": 10**9,
        }
    )
    kept = torch.load(task["batches"])

    class Kept:
        def at(self, step: int) -> Iterator[torch.Tensor]:
            yield kept[step % len(kept)]

    with joined(spec.system) as ranks:
        run = Run(spec, lambda progress, written: Decision.CONTINUE, ranks, Path())
        run.engine = build_engine(spec, ranks)
        run.packing, run.batches = None, Kept()  # type: ignore[assignment]
        turns, interval = Turns(), Interval(run.telemetry, 10**6)
        while True:
            turns.next()
            with interval.step(run.step + 1):
                loss, norm = run.train_step(interval)
            interval.add(loss, norm)


def transformers(task: dict[str, Any]) -> None:
    """transformers' Trainer with its LlamaForCausalLM: SDPA, fused AdamW, bf16 autocast."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    model, kept = task["model"], torch.load(task["batches"])
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=model["d_model"],
            intermediate_size=model["d_ff"],
            num_hidden_layers=model["n_layers"],
            num_attention_heads=model["n_heads"],
            num_key_value_heads=model["n_kv_heads"],
            head_dim=model["head_dim"],
            vocab_size=model["vocab"],
            tie_word_embeddings=model["tie_embeddings"],
            rms_norm_eps=model["norm_eps"],
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    assert sum(p.numel() for p in llama.parameters()) == task["stored_params"]

    class Sequences(Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return 10**7

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            batch = kept[index // task["sequences"] % len(kept)]
            tokens = batch[index % task["sequences"], :-1]
            return {"input_ids": tokens, "labels": tokens}

    class Takes(TrainerCallback):
        def __init__(self) -> None:
            self.turns = Turns()

        def on_train_begin(self, *given: Any, **more: Any) -> None:
            self.turns.next()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            self.turns.next()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=task["sequences"],
            max_steps=10**6,
            learning_rate=task["lr"],
            lr_scheduler_type="constant",
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=True,
            torch_compile=task["compile"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=llama, args=arguments, train_dataset=Sequences(), callbacks=[Takes()]).train()


def litgpt(task: dict[str, Any]) -> None:
    """LitGPT's `pretrain.main`, whole: its model compiled as it does, its loss, its logging."""
    import lightning as L
    from litgpt import pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import DataModule
    from litgpt.utils import choose_logger

    model, kept, turns = task["model"], torch.load(task["batches"]), Turns()
    config = Config(
        name="rival",
        block_size=task["seq_len"],
        n_layer=model["n_layers"],
        n_embd=model["d_model"],
        n_head=model["n_heads"],
        n_query_groups=model["n_kv_heads"],
        head_size=model["head_dim"],
        vocab_size=model["vocab"],
        padded_vocab_size=model["vocab"],
        intermediate_size=model["d_ff"],
        mlp_class_name="LLaMAMLP",
        norm_class_name="RMSNorm",
        norm_eps=model["norm_eps"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )

    class Steps(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            step = 0
            while True:
                turns.next()
                yield kept[step % len(kept)]
                step += 1

    class Data(DataModule):
        def connect(self, *given: Any, **more: Any) -> None:
            pass

        def train_dataloader(self) -> DataLoader[torch.Tensor]:
            return DataLoader(Steps(), batch_size=None)

        def val_dataloader(self) -> DataLoader[torch.Tensor]:
            return DataLoader(kept[:1], batch_size=None)

    with tempfile.TemporaryDirectory() as folder:
        logger = choose_logger("csv", Path(folder), name="rival", resume=False, log_interval=1)
        fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed", loggers=[logger])
        fabric.launch()
        optimizer = {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": task["lr"], "weight_decay": 0.1, "betas": [0.9, 0.95]},
        }
        pretrain.main(
            fabric=fabric,
            devices=1,
            seed=0,
            initial_checkpoint_dir=None,
            resume=False,
            config=config,
            data=Data(),
            out_dir=Path(folder),
            tokenizer_dir=None,
            tokenizer=None,
            train=TrainArgs(
                save_interval=None,
                global_batch_size=task["sequences"],
                micro_batch_size=task["sequences"],
                max_tokens=10**12,
                max_norm=1.0,
                lr_warmup_steps=0,
                tie_embeddings=model["tie_embeddings"],
            ),
            eval=EvalArgs(interval=10**9, final_validation=False),
            optimizer=optimizer,
        )


if __name__ == "__main__":
    told = json.loads(sys.argv[2])
    torch.set_num_threads(told["threads"])
    {"thriftlm": thriftlm, "transformers": transformers, "litgpt": litgpt}[sys.argv[1]](told)
