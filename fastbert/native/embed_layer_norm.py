"""embed_layer_norm and its backward by the extension: checks, then pointers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.native.extension import CPU_DTYPES, C, chosen_isa, cpu_reason, fresh


def supports_embed_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
) -> str | None:
    """None if `embed_layer_norm` and its backward take these arguments, else the reason why not."""
    tables = (word, token_type, position)
    if reason := cpu_reason(*tables, weight, bias):
        return reason
    shape, width = input_ids.shape, word.shape[-1]
    for ids in (input_ids, token_type_ids, position_ids):
        if ids.device.type != "cpu":
            return f"ids on device {ids.device}"
        if ids.dtype not in (torch.int64, torch.int32):
            return f"ids of dtype {ids.dtype}"
        if ids.dim() != 1 or ids.shape != shape:
            return f"ids of shape {tuple(ids.shape)}"
    for t in tables:
        if t.dim() != 2 or t.shape[1] != width:
            return f"a table of shape {tuple(t.shape)}"
        if t.stride(1) != 1 and width > 1:
            return "last dimension not contiguous"
    for t in (weight, bias):
        if t.shape != (width,) or not t.is_contiguous():
            return f"weight or bias of shape {tuple(t.shape)} and stride {t.stride()}"
    return None


def embed_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    with_statistics: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gathers, adds and normalises: ids (T,), tables (V, E), (types, E), (P, E) -> y (T, E), statistics (T, 2).

    One dtype, float32 or bfloat16. `seed` determines the dropped elements; the statistics are for the backward.

    Raises:
        ValueError: an id outside its table.
    """
    tokens, width = input_ids.shape[0], word.shape[1]
    y = fresh(word, tokens, width)
    statistics = fresh(word, tokens, 2, dtype=torch.float32) if with_statistics else None
    gathers, _held = _gathers((word, token_type, position), (input_ids, token_type_ids, position_ids))
    C.embed_layer_norm_cpu(
        CPU_DTYPES[word.dtype],
        tokens,
        width,
        *gathers,
        weight.data_ptr(),
        bias.data_ptr(),
        y.data_ptr(),
        0 if statistics is None else statistics.data_ptr(),
        eps,
        dropout_p,
        seed,
        chosen_isa()[1],
        torch.get_num_threads(),
    )
    return y, statistics


def embed_layer_norm_bwd(
    dy: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    statistics: Tensor,
    needed: tuple[bool, bool, bool, bool, bool],
    *,
    dropout_p: float = 0.0,
    seed: int = 0,
    padding_idx: int | None = None,
) -> list[Tensor | None]:
    """The gradients of word, token_type, position, weight and bias, None where not `needed`; dy is (T, E).

    Dense and in the tables' dtype; each is summed in float32, in an order independent of the threads.
    """
    if dy.stride(1) != 1 and dy.shape[1] > 1:  # the gradient of a sum is one number, expanded to (T, E)
        dy = dy.contiguous()
    tables = (word, token_type, position)
    outputs = [
        fresh(t, *t.shape) if wanted else None for t, wanted in zip((*tables, weight, weight), needed, strict=True)
    ]
    gathers, _held = _gathers(tables, (input_ids, token_type_ids, position_ids))
    C.embed_layer_norm_bwd_cpu(
        CPU_DTYPES[word.dtype],
        *dy.shape,
        *gathers,
        weight.data_ptr(),
        statistics.data_ptr(),
        dropout_p,
        seed,
        dy.data_ptr(),
        dy.stride(0),
        *(0 if t is None else t.data_ptr() for t in outputs),
        -1 if padding_idx is None else padding_idx % word.shape[0],
        chosen_isa()[1],
        torch.get_num_threads(),
    )
    return outputs


def _gathers(tables: Sequence[Tensor], ids: Sequence[Tensor]) -> tuple[list[tuple[int, int, int, int]], list[Tensor]]:
    """The C++ arguments of each table and its ids, and the id tensors they point into, which must outlive the call."""
    words, held = [], []
    for table, x in zip(tables, ids, strict=True):
        held.append(x.to(torch.int64).contiguous())
        words.append((table.data_ptr(), held[-1].data_ptr(), table.shape[0], table.stride(0)))
    return words, held
