"""GPUs, each figure with its source: the table `data/gpu_specs.csv`, and the names people use."""

import csv
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from thriftlm.spec import InputError, Spec
from thriftlm_models.kernels import Target

Row = Mapping[str, str]

MIB_PER_GIB = 1024
NODE_SHAPES = {
    "A100-80GB-SXM": "A100-80GB",
    "H100-SXM": "H100-80GB",
    "H100-MEGA": "H100-80GB",
    "NVIDIA GH200 480GB": "GH200",
}
"""SkyPilot's and nvidia-smi's names for variants that are one GPU to us."""
RARE = frozenset(("A100-64GB", "H100-64GB", "H100-96GB"))
"""Made for single clusters: meant only where their size is said."""
MUST_BE_SAID = frozenset(("pro", "ti"))
"""Words that name another chip: an RTX 6000 is no RTX PRO 6000."""


class Gpu(Spec):
    """A GPU type. What no source states is None, never zero."""

    id: str
    """Canonical id."""
    product: str
    """The maker's name, with the form factor."""
    bf16_tflops: PositiveFloat | None
    """Dense bf16 peak in 1e12 FLOP/s; None where there is none or none is known."""
    fp32_tflops: PositiveFloat | None
    """Dense fp32 peak in 1e12 FLOP/s, without TF32."""
    compute_capability: PositiveFloat | None
    """CUDA compute capability, which decides what kernels run; None for cpu."""
    memory_gib: PositiveFloat | None
    """Nominal memory in GiB."""
    usable_memory_gib: PositiveFloat | None
    """Memory in GiB that EC2 or nvidia-smi reports, which is less; the nominal one where neither
    is known. CUDA itself takes some of it."""
    memory_gb_per_s: PositiveFloat | None
    """Memory bandwidth in 1e9 bytes per second."""
    nvlink_gb_per_s: float | None
    """NVLink in 1e9 bytes per second and GPU, both directions added; 0 is no NVLink."""
    pcie: str | None
    """PCIe link of the GPU, as `Gen4 x16`."""
    gpus_per_node: PositiveInt | None
    """GPUs in a usual node; None for cpu, whose workers share one machine, and for loose cards."""
    node_network_gbit_per_s: PositiveFloat | None
    """Network of that node in 1e9 bits per second."""
    ray_accelerator_type: str | None
    """Name that Ray detects."""
    skypilot_name: str | None
    """Name in SkyPilot's catalog."""
    source: str
    """Where the figures come from."""


@cache
def gpus() -> dict[str, Gpu]:
    """Every known GPU by canonical id, `cpu` last."""
    return {row["id"]: _gpu(row) for _, row in rows("gpu_specs.csv", shipped("gpu_specs.csv"))}


def gpu(name: str) -> Gpu:
    """The GPU of a canonical id, or of a name that Ray, SkyPilot, nvidia-smi or people use.

    Case, hyphens and spaces do not matter; `A100` and `H100` without a form factor mean SXM.

    Raises:
        InputError: unknown, with the nearest ids; or one name for several, with their ids.
    """
    known = gpus()
    found = [name] if name in known else _matches(name)
    if len(found) == 1:
        return known[found[0]]
    if found:
        raise InputError(f"'{name}' names several GPUs: {', '.join(found)}; say which")
    names = {key.split("-")[0].casefold(): key for key in reversed(known)}
    names |= {key.casefold(): key for key in known}
    near = get_close_matches(name.casefold(), names, n=1)
    hint = f"did you mean '{names[near[0]]}'? " if near else ""
    raise InputError(f"unknown GPU '{name}'; {hint}known: {', '.join(known)}")


def _matches(name: str) -> list[str]:
    if name.upper() in NODE_SHAPES:
        return [NODE_SHAPES[name.upper()]]
    asked = _words(name)
    words = {key: _words(key) for key in gpus()}
    products = {key: _words(entry.product) for key, entry in gpus().items()}
    exact = [key for key, own in words.items() if asked in (own, products[key])]
    if exact or not asked:
        return exact
    wider = [
        key
        for key, own in words.items()
        if asked < own | products[key] and not (own - asked) & MUST_BE_SAID
    ]
    plain = [key for key in wider if not (words[key] - asked) & {"pcie", "nvl"}]
    return [key for key in plain if key not in RARE] or plain or wider


def _words(name: str) -> frozenset[str]:
    """The words of a name that tell GPUs apart: "NVIDIA A100-SXM4-80GB" is {a100, 80gb}."""
    sized = re.sub(r"(\d+)[\s_-]*g(?:i?b)?\b", r"\1gb", name.casefold())
    parted = re.sub(r"(?<=\d)(pcie|nvl|sxm|ti\b)|(?<=rtx)(pro)?(?=\d)", r" \1\2 ", sized)
    words = re.split(r"[\s_-]+", parted)
    silent = re.compile(
        r"nvidia|tesla|geforce|blackwell|server|workstation|edition|sxm\d?|hbm\de?|"
    )
    return frozenset(word for word in words if not silent.fullmatch(word))


def _gpu(row: Row) -> Gpu:
    def number(column: str) -> float | None:
        return float(row[column]) if row[column] else None

    reported = number("usable_memory_mib")
    return Gpu(
        id=row["id"],
        product=row["product"],
        bf16_tflops=number("bf16_dense_tflops"),
        fp32_tflops=number("fp32_tflops"),
        compute_capability=number("compute_capability"),
        memory_gib=number("hbm_gib"),
        usable_memory_gib=reported / MIB_PER_GIB if reported else number("hbm_gib"),
        memory_gb_per_s=number("hbm_gbps"),
        nvlink_gb_per_s=number("nvlink_gbps_per_gpu_bidirectional"),
        pcie=row["pcie"] or None,
        gpus_per_node=int(row["typical_gpus_per_node"]) if row["typical_gpus_per_node"] else None,
        node_network_gbit_per_s=number("node_network_gbps"),
        ray_accelerator_type=row["ray_accelerator_type"] or None,
        skypilot_name=row["skypilot_name"] or None,
        source=row["source"],
    )


def attention_target(gpu_name: str, precision: str) -> Target:
    """Where attention would run, for `thriftlm_models.kernels` to say which kernel can.

    Raises:
        InputError: unknown GPU.
    """
    card = gpu(gpu_name)
    device: Literal["cpu", "cuda"] = "cpu" if card.id == "cpu" else "cuda"
    return Target(device, card.compute_capability, in_bf16=precision != "fp32")


def rows(name: str, text: str) -> Iterator[tuple[str, Row]]:
    """Rows of a CSV text by column name, each with the `file:line` where it ends."""
    reader = csv.DictReader(text.splitlines(), restval="")
    for row in reader:
        yield f"{name}:{reader.line_num}", row


@cache
def shipped(name: str) -> str:
    """Text of a table in `data/`."""
    return files("thriftlm").joinpath("data", name).read_text(encoding="utf-8")
