"""A decoder laid out over several ranks by torch: DDP and the ways of FSDP2.

| strategy | weights between passes | gradients and optimizer state |
|---|---|---|
| `ddp` | whole | whole |
| `fsdp_full` | sharded, gathered again for backward | sharded |
| `fsdp_grad_op` | sharded, kept whole from forward to backward | sharded |
| `hsdp` | as `fsdp_full` within a node, the same in every node | sharded within a node |

A shared block is one module, so it is sharded, gathered and reduced once however often it runs.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from thriftlm import catalog
from thriftlm.spec import InputError, RunSpec, SystemSpec
from thriftlm.training.ranks import Ranks
from thriftlm_models.decoder import Decoder


def spread(model: Decoder, spec: RunSpec, ranks: Ranks) -> nn.Module:
    """The model laid out over the ranks; the root shard holds embedding, head and last norm."""
    system = spec.system
    if system.strategy == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    shape = mesh_shape(system, ranks.world_size)
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    for block in model.blocks:
        _shard(block, system, mesh)
    _shard(model, system, mesh)
    return model


def mesh_shape(system: SystemSpec, world_size: int) -> tuple[int, ...]:
    """Ranks that shard, or for `hsdp` how many copies times how many that shard one.

    >>> mesh_shape(SystemSpec(strategy="hsdp", n_gpus=4, gpus_per_node=2), 4)
    (2, 2)

    Raises:
        InputError: nodes of that size do not make up the ranks.
    """
    if system.strategy != "hsdp":
        return (world_size,)
    node = system.gpus_per_node or catalog.gpu(system.gpu).gpus_per_node or world_size
    inside = min(node, world_size)
    if world_size % inside:
        raise InputError(
            f"hsdp shards within nodes: {inside} GPUs of one do not divide {world_size}; set "
            "system.gpus_per_node or another system.n_gpus"
        )
    return (world_size // inside, inside)


def _shard(module: nn.Module, system: SystemSpec, mesh: DeviceMesh) -> None:
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=system.strategy != "fsdp_grad_op",
        mp_policy=_precision(system),
        offload_policy=_offload(system),
    )


def _precision(system: SystemSpec) -> MixedPrecisionPolicy:
    if system.precision == "amp_bf16":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


def _offload(system: SystemSpec) -> OffloadPolicy:
    if system.cpu_offload:
        return CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    return OffloadPolicy()
