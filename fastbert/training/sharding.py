"""Full sharding (FSDP2), for models that do not fit: each process keeps its part of every parameter, gradient and
moment, and has the whole of a layer only while that layer runs.

Layers are the unit; embeddings and heads are one more, with the objective. What torch then has in a parameter's place
is a DTensor, whose `to_local` is this process's part.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard(objective: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Spreads the parameters of an objective and its model over all processes; they may come from the host.

    The layers' weights travel in `dtype`, that of autocast, in which they multiply anyway; norms are rounded with them.
    Parameters, sums of gradients and moments stay in float32. Embeddings and heads travel as they are.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Torch keeps the mesh for good, in its caches, and with it a group of its own: `join` can end all others.
    mesh = DeviceMesh.from_group(dist.new_group(), device.type)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = objective.model.bert.encoder.layer
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh)
    for module in (*layers, objective):
        module.register_forward_pre_hook(_count_writes)


def _count_writes(module: nn.Module, args: tuple) -> None:
    """Gathering weights leaves their version counters as they are, by which a backend knows its packed ones stale."""
    torch.autograd.graph.increment_version(list(module.parameters()))


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor, in the same memory; one that is not sharded is a part by itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """All of a tensor, in every process: each must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, parameter: Any) -> Tensor:
    """The tensor, which every process has, sharded as the parameter is; a number stays as it is."""
    if not (is_sharded(parameter) and tensor.dim()):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def total_squares(squares: Tensor) -> Tensor:
    """The sum over all processes of what each has of its own parts."""
    dist.all_reduce(squares)
    return squares


def gather_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The model's state dict on the host, where it is to be kept; one tensor at a time is whole on the devices."""
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor.detach())
        if keep:
            state[name] = tensor.cpu()
    return state


def save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes tensors by torch.distributed.checkpoint, each process its own parts, flushed to the disk.

    Raises:
        OSError: in every process, what failed in any.
    """
    import torch.distributed.checkpoint as dcp

    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder, sync_files=True))
    except dcp.api.CheckpointException as error:
        raise _first_failure(error) from error


def load_shards(like: dict[str, Tensor], folder: Path) -> None:
    """Fills whole or sharded tensors, of any number of processes, with what `save_shards` wrote.

    Raises:
        OSError: what cannot be read.
    """
    import torch.distributed.checkpoint as dcp

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as `no_dist` says it may be
            dcp.load(like, storage_reader=dcp.FileSystemReader(folder), no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:
        raise _first_failure(error) from error


def shapes_of_shards(folder: Path) -> dict[str, torch.Size]:
    """The names and whole shapes of the tensors that `save_shards` wrote.

    Raises:
        OSError: the list of them cannot be read.
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
