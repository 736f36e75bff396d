"""y = dropout(LayerNorm(word[id] + token_type[id] + position[id])), and its gradients.

Bytes: the forward reads ids and three rows a token (of which two come from small tables, so from cache) and writes y,
2 * T * E * itemsize and a little. It keeps mean and rstd; the backward gathers the rows again, reads dy and writes
the gradient of the sum (T, E) in the tables' dtype. That is then read once more for each table, in the order of its
ids, by `segment_sums`. Everything is summed in fp32, without atomics, the same bits each time.

An id outside its table is never read: its row becomes NaN, in y and in what the gradients make of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import architecture, configs, dropout
from fastbert.kernels.layer_norm import (
    columns_of,
    dropped,
    gradient,
    load_tile,
    load_vector,
    programs_for,
    row_keys,
    statistics,
    store_partials,
    store_tile,
    sum_partials,
)
from fastbert.kernels.segments import segment_sums


@triton.jit
def _load_ids(ptr, rows, mask, size):
    """(ROWS, 1) ids in int64, and which of them are within a table of `size` rows; those that are not become 0."""
    ids = tl.load(ptr + rows, mask=mask, other=0).to(tl.int64)
    valid = (ids >= 0) & (ids < size)
    return tl.where(valid, ids, 0), valid


@triton.jit
def _sum_of_rows(
    word_ids, type_ids, position_ids, valid, word_ptr, type_ptr, position_ptr,
    stride_w, stride_t, stride_p, columns, mask,
):  # fmt: skip
    mask = mask & valid
    x = load_tile(word_ptr, word_ids, stride_w, columns, mask)
    x += load_tile(type_ptr, type_ids, stride_t, columns, mask)
    x += load_tile(position_ptr, position_ids, stride_p, columns, mask)
    return tl.where(valid, x, float("nan"))
