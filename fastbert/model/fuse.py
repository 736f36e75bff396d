"""One matrix product for queries, keys and values, while each keeps its own parameters under its own name."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from fastbert import ops

_PROJECTIONS = ("query", "key", "value")
_fusing = Lock()
# query -> (state of the six parameters, the views of their storages): the same tensors come back for as long
# as nothing has changed, so that a backend can keep a packed copy by them.
_views: WeakKeyDictionary[nn.Linear, tuple[tuple, Tensor, Tensor | None]] = WeakKeyDictionary()
# query -> the views that there may be, of this state and of earlier ones.
_made: WeakKeyDictionary[nn.Linear, list[ref[Tensor]]] = WeakKeyDictionary()


def qkv_parameters(attention: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The stacked weight (3E, E) and bias (3E,) of a self-attention's linear layers, for one call of ops.linear.

    Where a gradient is wanted, they are concatenated, which is differentiable. Elsewhere the three parameters are laid
    into one storage, once, and every call gets a view of it: no copy is kept, so a weight changed in place by whatever
    means is never stale. The parameters stay the same objects. None where they must stay where they are: somebody else
    is looking at their memory, or `attention.may_move_qkv` is False.
    """
    query, *_ = projections = _projections(attention)
    tables = [linear._parameters for linear in projections]  # attributes of a module are slow
    weights = [table["weight"] for table in tables]
    biases = [] if tables[0]["bias"] is None else [table["bias"] for table in tables]
    parameters = weights + biases  # with a bias or without: the three are alike, see project_qkv
    wanted = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    if wanted or _is_recorded():
        return torch.cat(weights), torch.cat(biases) if biases else None
    # Inference tensors do not say when they change.
    if not getattr(attention, "may_move_qkv", True) or any(p.is_inference() for p in parameters):
        return None
    known = _views.get(query)
    if known is not None and known[0] == _state(parameters):
        return known[1:]
    # Made in inference mode, the storage would turn the parameters into tensors that cannot be trained any more.
    with _fusing, torch.inference_mode(False), torch.no_grad():
        if separate_qkv not in attention._state_dict_pre_hooks.values():
            attention.register_state_dict_pre_hook(separate_qkv)
        groups = [parts for parts in (weights, biases) if parts]
        if not all(_adjacent(parts) or _movable(parts) for parts in groups):
            return None
        weight, bias = [*map(_fuse, groups), None][:2]
        _views[query] = (_state(parameters), weight, bias)
        alive = [made for made in _made.get(query, ()) if made() is not None]
        _made[query] = [*alive, *(ref(t) for t in (weight, bias) if t is not None)]
    return weight, bias


def replace_qkv(attention: nn.Module, weight: Tensor) -> None:
    """Puts `weight` (3E, E), which has no memory, in place of the three: from now on `qkv_parameters` returns it."""
    _, bias = qkv_parameters(attention)  # not None: `weight` was made of them
    projections = _projections(attention)
    for linear in projections:
        linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
    weights, biases = zip(*((p.weight, p.bias) for p in projections), strict=True)
    _views[projections[0]] = (_state([*weights, *(b for b in biases if b is not None)]), weight, bias)


def separate_qkv(attention: nn.Module, *_: Any) -> None:
    """Gives each of the three parameters memory of its own again, where `qkv_parameters` has laid them together and
    nobody else is looking at it.

    Before every state_dict, too: what saves one takes tensors of one storage for one tied weight, and may drop two.
    """
    # Somebody may have put others in their place by now, around ours (an adapter) or not.
    projections = [attention._modules.get(name) for name in _PROJECTIONS]
    with _fusing, torch.inference_mode(False), torch.no_grad():
        for parts in ([getattr(p, name, None) for p in projections] for name in ("weight", "bias")):
            if all(type(p) is nn.Parameter and not p.is_shared() for p in parts) and _adjacent(parts):
                storage = parts[0].untyped_storage()
                filled = storage.nbytes() == sum(p.numel() * p.element_size() for p in parts)
                # Users are the parts, views of all of them, each with a base, and `storage`.
                views = [v for each in list(_made.values()) for made in each if (v := made()) is not None]
                ours = [v for v in views if v.untyped_storage().data_ptr() == storage.data_ptr()]
                users = len(parts) + sum(1 + (v._base is not None) for v in ours) + 1
                if filled and torch._C._storage_Use_Count(storage._cdata) <= users:
                    _views.pop(projections[0], None)
                    for p in parts:
                        p.data = p.detach().clone()


def forget_qkv(attention: nn.Module) -> None:
    """Undoes what `qkv_parameters` has done to this module, if it has: see `separate_qkv`."""
    hooks = attention._state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is separate_qkv]:
        separate_qkv(attention)
        del hooks[key]


def _is_recorded() -> bool:
    """Whether somebody traces, compiles or transforms this call, and would not see a parameter move."""
    return torch.compiler.is_compiling() or ops.pointer_reason() is not None


def _projections(attention: nn.Module) -> list[nn.Linear]:
    return [attention._modules[name] for name in _PROJECTIONS]


def _state(parameters: list[Tensor]) -> tuple:
    return tuple((p.data_ptr(), p._version, p.shape, p.stride()) for p in parameters)


def _fuse(parts: list[Tensor]) -> Tensor:
    """One view of the parts, which are moved into one storage if need be."""
    if not _adjacent(parts):
        fused = torch.cat([p.detach() for p in parts])
        for p, view in zip(parts, fused.split([len(p) for p in parts]), strict=True):
            p.data = view
    first = parts[0].detach()
    return first.as_strided((sum(len(p) for p in parts), *first.shape[1:]), first.stride())


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether the parts lie one behind the other in one storage."""
    storage, end = parts[0].untyped_storage().data_ptr(), parts[0].data_ptr()
    for p in parts:
        if p.data_ptr() != end or p.untyped_storage().data_ptr() != storage or not p.is_contiguous():
            return False
        end += p.numel() * p.element_size()
    return True


def _movable(parts: list[Tensor]) -> bool:
    return all(_owns_its_storage(p) for p in parts) and len({id(p) for p in parts}) == len(parts)


def _owns_its_storage(p: Tensor) -> bool:
    """Whether nobody else is looking at the memory of `p`: not a flat buffer's slice, not shared memory, no alias of it
    (an average of the weights, say, that holds `p.data`)."""
    if type(p) is not nn.Parameter or p.is_inference() or p.is_shared():
        return False
    storage = p.untyped_storage()
    # One user is p, the other `storage`.
    alone = torch._C._storage_Use_Count(storage._cdata) <= 2
    return alone and storage.nbytes() == p.numel() * p.element_size()
