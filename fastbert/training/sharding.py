"""Full sharding (FSDP2), for models that do not fit: each process holds a shard of every parameter, gradient and
moment. A layer's weights are gathered only while that layer runs.

Each layer is an FSDP unit; embeddings, heads and objective are one more. Parameters become DTensors, whose `to_local`
is this process's shard.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbert.config import family_of


def shard(objective: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Shards the parameters of an objective and its model over all processes; they may be on the host.

    The layers' weights are gathered in `dtype`, that of autocast, in which they multiply anyway; this also rounds the
    norms. Parameters, sums of gradients and moments are float32. Embeddings and heads are gathered unconverted.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # torch caches the mesh, and so its group, forever. Give it a group of its own: `join` can destroy the others.
    mesh = DeviceMesh.from_group(dist.new_group(), device.type)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model: Any = objective.model
    layers = family_of(model.config.model_type).layers(model.base_model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh)
    for module in (*layers, objective):
        module.register_forward_pre_hook(_count_writes)


def _count_writes(module: nn.Module, args: tuple) -> None:
    """Bumps version counters: gathering weights bypasses them, and a backend detects stale packed weights by them."""
    torch.autograd.graph.increment_version(list(module.parameters()))


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """This process's shard of a tensor, in the same memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """Gathers a whole tensor in every process; a collective, which all processes must call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, parameter: Any) -> Tensor:
    """Shards a tensor, which every process has whole, like the parameter; a 0-d tensor is returned unchanged."""
    if not (is_sharded(parameter) and tensor.dim()):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def total_squares(squares: Tensor) -> Tensor:
    """The sum over all processes of each one's sums of squares; in place."""
    dist.all_reduce(squares)
    return squares


def gather_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The model's state dict on the host, empty unless `keep`. Tensors are gathered on the devices one at a time."""
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor.detach())
        if keep:
            state[name] = tensor.cpu()
    return state


def save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes tensors by torch.distributed.checkpoint, each process its own shards, flushed to disk.

    Raises:
        OSError: writing failed in a process; raised in all.
    """
    import torch.distributed.checkpoint as dcp

    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder, sync_files=True))
    except dcp.api.CheckpointException as error:
        raise _first_failure(error) from error


def load_shards(like: dict[str, Tensor], folder: Path) -> None:
    """Fills whole or sharded tensors with those that `save_shards` wrote, possibly in another number of processes.

    Raises:
        OSError: a file cannot be read.
    """
    import torch.distributed.checkpoint as dcp

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended, by `no_dist`
            dcp.load(like, storage_reader=dcp.FileSystemReader(folder), no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:
        raise _first_failure(error) from error


def shapes_of_shards(folder: Path) -> dict[str, torch.Size]:
    """The names and whole shapes of the tensors that `save_shards` wrote.

    Raises:
        OSError: their metadata cannot be read.
    """
    import torch.distributed.checkpoint as dcp

    try:
        entries: dict[str, Any] = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        return {name: entry.size for name, entry in entries.items()}
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        raise OSError(f"no list of tensors: {error}") from error


def _first_failure(error: Any) -> OSError:
    failure = next(iter(error.failures.values()))[0]
    return failure if isinstance(failure, OSError) else OSError(f"{type(failure).__name__}: {failure}")
