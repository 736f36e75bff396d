"""linear_cross_entropy and its gradients by the extension: a chunk of the vocabulary at a time.

Logits are computed transposed, (V, K): the products for the logits and for the weight's gradient then use the weight's
own layout, and nothing of the vocabulary's size is packed. (A weight in training changes at each step; packing 94 MB
for 150 tokens would cost as much as their product.)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.native.extension import CPU_DTYPES, C, chosen_isa, cpu_reason, fresh, misaligned

# Bytes of logits per chunk. For the loss alone, so few that they stay in the cache. With gradients, logits of the whole
# vocabulary are computed only once if they fit in one chunk.
_LOSS_BYTES, _GRADIENT_BYTES = 4 << 20, 64 << 20
_CHUNK_WORDS = 1024  # of the weight, transposed at a time for dx
_TOKENS, _BLOCK = 32, 128  # the extension takes multiples of so many tokens, and of so many words
_thread = threading.local()


def supports_linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, ignore_index: int = -100
) -> str | None:
    """None if `linear_cross_entropy` takes these arguments, else the reason why not."""
    if reason := cpu_reason(x, weight, bias):
        return reason
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or not 0 < weight.shape[0] < 2**31:
        return f"shapes {tuple(x.shape)} and {tuple(weight.shape)}"
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        return "last dimension not contiguous"
    if x.dtype == torch.bfloat16 and (weight.shape[1] % 2 or weight.stride(0) % 2 or misaligned(weight, 4)):
        return "odd width or row stride in bf16"
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        return f"bias of shape {tuple(bias.shape)}"
    if labels.device.type != "cpu" or labels.dtype not in (torch.int64, torch.int32) or labels.shape != x.shape[:1]:
        return f"labels of shape {tuple(labels.shape)} and dtype {labels.dtype} on {labels.device}"
    return None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    needed: Sequence[bool] = (False, False, False),
) -> tuple[Tensor, list[Tensor | None]]:
    """(T, E), (V, E), (V,), (T,) -> the mean loss (), and the gradients of x, weight and bias that are `needed`.

    float32 or bfloat16; logits are rounded to that dtype, everything after them is float32.

    Raises:
        ValueError: a label outside 0..V-1 that is not `ignore_index`.
    """
    kept = (labels != ignore_index).nonzero().squeeze(1)
    count = len(kept)
    # dx is zero in rows without a label; the other gradients are written in full, unless there is no label at all.
    make = (torch.zeros_like, torch.empty_like if count else torch.zeros_like)
    gradients = [
        make[t is not x](t, memory_format=torch.contiguous_format) if wanted and t is not None else None
        for t, wanted in zip((x, weight, bias), needed, strict=True)
    ]
    if not count:
        return x.new_full((), float("nan")), gradients
    call = _Call(x, weight, bias, labels, kept)
    if any(needed):
        call.with_gradients(*gradients)
    else:
        call.statistics(_LOSS_BYTES)
    call.keep()
    loss = call.losses().sum() / count
    return loss.to(x.dtype), gradients


class _Call:
    """The labelled tokens of one call, padded with zeros to K rows, and their statistics."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, kept: Tensor) -> None:
        self.weight, self.bias, self.kept, self.count = weight, bias, kept, len(kept)
        self.V, self.E = weight.shape
        self.K = -(-self.count // _TOKENS) * _TOKENS
        self.dtype, self.isa, self.threads = CPU_DTYPES[x.dtype], chosen_isa()[1], torch.get_num_threads()
        self.rows = x.new_zeros(self.K, self.E)
        self.rows[: self.count] = x.detach().index_select(0, kept)
        self.labels = x.new_full((self.K,), -1, dtype=torch.int32)
        labels = labels.index_select(0, kept)
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= self.V:
            raise ValueError(
                f"linear_cross_entropy: labels holds {low if low < 0 else high}; the weight has {self.V} rows, so 0 "
                f"to {self.V - 1} are valid"
            )
        self.labels[: self.count] = labels
        self.row_max, self.total, self.picked = x.new_zeros((3, self.K), dtype=torch.float32)
        self.packed_rows = self._pack(self.rows)
        # Owned by this call until it is done, as a signal handler may call the op meanwhile.
        self.memory, _thread.memory = getattr(_thread, "memory", None), None

    def statistics(self, budget: int) -> Tensor | None:
        """Fills row_max, total and picked; returns the logits if one chunk holds the whole vocabulary."""
        partial = fresh(self.row_max, C.cross_entropy_blocks(self.V), 2, self.K)
        chunks = self._stretches(budget)
        for first, size in chunks:
            logits = self._logits(first, size)
            C.cross_entropy_statistics_cpu(
                *(self.dtype, size, self.K, first, logits.data_ptr(), self._bias(first), self.labels.data_ptr()),
                *(partial[first // _BLOCK].data_ptr(), self.picked.data_ptr(), self.isa, self.threads),
            )
        C.cross_entropy_combine_cpu(
            *(partial.data_ptr(), len(partial), self.K, self.row_max.data_ptr(), self.total.data_ptr()),
            *(self.isa, self.threads),
        )
        return logits if len(chunks) == 1 else None

    def losses(self) -> Tensor:
        """The loss per token, (count,), in fp64, so that the order of their sum does not show."""
        row_max, total, picked = (t[: self.count].double() for t in (self.row_max, self.total, self.picked))
        return (row_max - picked) + total.log()

    def with_gradients(self, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> None:
        """Fills the statistics and the gradients that are not None."""
        there = self.statistics(_GRADIENT_BYTES)
        scale, inverse = torch.zeros_like(self.total), self.total.reciprocal()
        scale[: self.count] = 1 / self.count
        packed_columns = None if dweight is None else self._pack(self.rows.t().contiguous())
        drows = None if dx is None else _Rows(self)
        for first, size in self._stretches(_GRADIENT_BYTES):
            logits = self._logits(first, size) if there is None else there
            C.cross_entropy_bwd_cpu(
                *(self.dtype, size, self.K, first, logits.data_ptr(), self._bias(first), self.labels.data_ptr()),
                *(self.row_max.data_ptr(), inverse.data_ptr(), scale.data_ptr()),
                *(0 if dbias is None else dbias[first:].data_ptr(), self.isa, self.threads),
            )
            if packed_columns is not None and dweight is not None:
                self._multiply(logits, packed_columns, dweight[first : first + size])
            if drows is not None:
                drows.add(logits, first, size)
        if dx is not None and drows is not None:
            dx.index_copy_(0, self.kept, drows.sums)

    def _stretches(self, budget: int) -> list[tuple[int, int]]:
        """The vocabulary in chunks (first word, words), each with about `budget` bytes of logits."""
        words = max(budget // (self.K * self.rows.element_size()) // _BLOCK, 1) * _BLOCK
        return [(first, min(words, self.V - first)) for first in range(0, self.V, words)]

    def _logits(self, first: int, size: int) -> Tensor:
        """Logits of words first to first + size, without bias: (size, K)."""
        logits = self._workspace(size)
        self._multiply(self.weight[first : first + size], self.packed_rows, logits)
        return logits

    def _workspace(self, size: int) -> Tensor:
        elements = size * self.K
        if self.memory is None or self.memory.dtype != self.rows.dtype or self.memory.numel() < elements:
            self.memory = None  # freed first, so that both never exist at once
            self.memory = fresh(self.rows, elements)
        return self.memory[:elements].view(size, self.K)

    def keep(self) -> None:
        """Leaves the memory of the logits to the thread's next call, unless it is large."""
        _thread.memory = None if self.memory is None or self.memory.nbytes > _GRADIENT_BYTES else self.memory

    def _bias(self, first: int) -> int:
        return 0 if self.bias is None else self.bias.data_ptr() + first * self.bias.element_size()

    def _pack(self, operand: Tensor) -> Tensor:
        """(N, K) as the second operand of `_multiply`."""
        N, K = operand.shape
        kind = self.dtype, C.PRECISION_full, N, K
        packed = fresh(operand, C.packed_weight_bytes(*kind, self.isa), dtype=torch.uint8)
        C.pack_weight_cpu(*kind, operand.data_ptr(), operand.stride(0), 0, packed.data_ptr(), self.isa, self.threads)
        return packed

    def _multiply(self, a: Tensor, packed: Tensor, out: Tensor) -> None:
        """out (M, N) = a (M, K) b^T, with b (N, K) packed."""
        (M, K), N = a.shape, out.shape[1]
        C.linear_cpu(
            *(self.dtype, C.PRECISION_full, M, N, K, a.data_ptr(), a.stride(0), packed.data_ptr(), out.data_ptr()),
            *(out.stride(0), C.ACTIVATION_none, False, self.isa, self.threads),
        )


class _Rows:
    """dx at the labelled tokens (count, E), summed over the vocabulary: the gradient of the logits times the weight.

    Both are transposed a chunk of words at a time, which stays in the cache. A product of torch's needs no transposes,
    but its bits depend on the number of threads.
    """

    def __init__(self, call: _Call) -> None:
        self.call = call
        weight, size = call.weight, call.weight.element_size()
        self.per_word = 4 // size
        chunk = min(_CHUNK_WORDS * self.per_word, -(-call.V // self.per_word) * self.per_word)
        self.chunk, self.stride = chunk, chunk + 64 // size  # so that a column does not map to one cache set
        self.turned = fresh(weight, call.count, self.stride)
        kind = call.dtype, C.PRECISION_full, call.E, chunk
        self.packed = fresh(weight, C.packed_weight_bytes(*kind, call.isa), dtype=torch.uint8)
        self.sums = fresh(weight, call.count, call.E)
        self.wide = self.sums if self.per_word == 1 else fresh(weight, call.count, call.E, dtype=torch.float32)

    def add(self, logits: Tensor, first: int, size: int) -> None:
        """Adds the words `first` to `first + size`; `logits` (size, K) holds the gradients of their logits."""
        call = self.call
        for start in range(0, size, self.chunk):
            words = min(self.chunk, size - start)
            even, word = -(-words // self.per_word) * self.per_word, first + start
            C.activation_bwd_cpu(
                *(call.dtype, words, call.count, logits[start:].data_ptr(), logits.stride(0), 0, 0, 0, 0),
                *(self.turned.data_ptr(), self.stride, 0, C.ACTIVATION_none, call.isa, call.threads),
            )
            weight = call.weight[word:]
            C.pack_transposed_cpu(
                *(call.dtype, call.E, even, weight.data_ptr(), words, weight.stride(0), self.packed.data_ptr()),
                *(0, words, call.isa, call.threads),
            )
            C.linear_dweight_cpu(
                *(call.dtype, call.count, call.E, even, self.turned.data_ptr(), self.stride, self.packed.data_ptr()),
                *(self.wide.data_ptr(), self.sums.data_ptr(), word == 0, word + words == call.V),
                *(call.isa, call.threads),
            )
