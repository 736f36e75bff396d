"""Each op in plain PyTorch, which defines it: differentiable, for any dtype and device.

A faster implementation is correct if it agrees with the one here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import groupby

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad

# Hugging Face's names. gelu_new and gelu_pytorch_tanh are one formula (Hendrycks & Gimpel, 2016, eq. 2).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: gelu_tanh(x),
    "gelu_pytorch_tanh": lambda x: gelu_tanh(x),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh approximation. In fp32 and fp64 the formula is written out: torch's derivative loses digits where
    tanh is close to 1 (an error of 1.0e-6 in fp32 with Intel's kernels, 5.6e-7 with the formula)."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return F.gelu(x, approximate="tanh")
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


# Rows whose logits linear_cross_entropy holds at a time: 1024 x 30522 in fp32 are 125 MB.
_LOSS_ROWS = 1024
_EXACT_COLUMNS = 1024
_SCORES = 1 << 23  # scores that attention_bwd holds at a time: 32 MB in fp32


def embed_layer_norm(
    input_ids: Tensor,  # (T,)
    token_type_ids: Tensor,  # (T,)
    position_ids: Tensor,  # (T,)
    word: Tensor,  # (V, E)
    token_type: Tensor,  # (2, E)
    position: Tensor,  # (P, E)
    weight: Tensor,  # (E,)
    bias: Tensor,  # (E,)
    *,
    eps: float,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
) -> Tensor:  # (T, E)
    x = F.embedding(input_ids, word, padding_idx=padding_idx)
    x = x + F.embedding(token_type_ids, token_type) + F.embedding(position_ids, position)
    x = layer_norm(x, weight, bias, eps)
    return F.dropout(x, dropout_p) if dropout_p else x


def linear(
    x: Tensor,  # (T, E)
    weight: Tensor,  # (F, E)
    bias: Tensor | None = None,  # (F,)
    *,
    activation: str | None = None,
    precision: str | None = None,
    gated: bool = False,
) -> Tensor:  # (T, F), gated (T, F / 2)
    if precision == "int8":
        return linear_int8(x, weight, bias, activation=activation, gated=gated)
    y = F.linear(x, weight, bias)  # "high" and "highest" permit less than fp32 but do not require it
    return activated(y, activation, gated)


def activated(z: Tensor, activation: str | None, gated: bool = False) -> Tensor:
    """act(z); gated, act(a) b of the halves a and b of z's columns (Shazeer, 2020)."""
    if not gated:
        return z if activation is None else ACTIVATIONS[activation](z)
    a, b = z.chunk(2, dim=-1)
    return activated(a, activation) * b


def linear_int8(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, gated: bool = False
) -> Tensor:
    """Rotates x and weight and rounds both to int8, with a scale per row; sums in int32, the rest in fp32."""
    with torch.autocast(x.device.type, enabled=False):  # it would round the sums to bf16
        (x8, x_scale), (weight8, weight_scale) = (quantize_rows(rotate(t)) for t in (x, weight))
        # fp32 sums integers exactly up to 2^24; the sum of _EXACT_COLUMNS products of 127 x 127 stays below that.
        blocks = zip(x8.split(_EXACT_COLUMNS, dim=1), weight8.split(_EXACT_COLUMNS, dim=1), strict=True)
        sums = reduce(torch.add, (F.linear(a.float(), b.float()).int() for a, b in blocks))
        y = sums.float() * x_scale * weight_scale.mT
        y = y if bias is None else y + bias.float()
        return activated(y, activation, gated).to(x.dtype)


def describe_precision(precision: str | None) -> str | None:
    """How `linear` above treats a precision, for `explain`."""
    if precision == "int8":
        return "int8: as it is defined, slower than fp32"
    return None if precision is None else f"{precision}: in full fp32"


def rotate(x: Tensor) -> Tensor:
    """x (M, K) in fp32, each block of 128 columns, as 8 x 16, multiplied by the orthonormal 8 x 8 Hadamard matrix.

    Applied to both x and weight, it leaves their product unchanged. It spreads a large column over eight, so the row's
    scale shrinks: in some tokens of a BERT one column is 20 times the others, and without the rotation the others are
    lost in the rounding (QuaRot: Ashkboos et al., 2024). Columns after the last multiple of 128 stay as they are.
    """
    x = x.float()
    whole = x.shape[1] // 128 * 128
    if not whole:
        return x
    parts = x[:, :whole].unflatten(1, (-1, 2, 2, 2, 16))
    for dim in (2, 3, 4):
        a, b = parts.unbind(dim)
        parts = torch.stack([a + b, a - b], dim)
    return torch.cat([parts.flatten(1) * 8**-0.5, x[:, whole:]], dim=1)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) as int8 (M, K) times a scale (M, 1) in fp32, amax / 127: symmetric, rounded half to even."""
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    scale = scale.masked_fill(scale == 0, 1.0)
    # The clamp is for rows so small that their scale is subnormal and has lost digits.
    return (x / scale).clamp(-127, 127).round().to(torch.int8), scale


def attention(
    qkv: Tensor,  # (T, 3, H, D)
    cu_seqlens: Tensor,  # (B+1,)
    max_seqlen: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,  # (H, 2P-1)
    window: int | None = None,
) -> Tensor:  # (T, H, D)
    """Attention within each sequence; a token after the last sequence gets zeros."""
    if bias is not None:
        return attention_formula(qkv, cu_seqlens, scale, bias, dropout_p, window)
    if not dropout_p and not torch.compiler.is_compiling() and is_transformed():
        return attention_formula(qkv, cu_seqlens, scale, window=window)
    contexts = []
    for run in _equal_length_runs(qkv, cu_seqlens):
        q, k, v = run.permute(2, 0, 3, 1, 4)  # each (N, H, L, D)
        mask = None if window is None else within_window(run.shape[1], window, run.device)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        contexts.append(context.transpose(1, 2).flatten(0, 1))
    return _with_tail(torch.cat(contexts) if contexts else qkv[:0, 0].clone(), len(qkv))


def attention_formula(
    qkv: Tensor,
    cu_seqlens: Tensor,
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """`attention` by formula, (T, 3, H, D) -> (T, H, D): differentiable to any order in both modes."""
    scale, contexts = qkv.shape[-1] ** -0.5 if scale is None else scale, []
    for run in _equal_length_runs(qkv, cu_seqlens):
        q, k, v = run.permute(2, 0, 3, 1, 4)  # each (N, H, L, D)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q @ k.mT * scale
        scores = scores if bias is None else scores.to(wide) + bias_of_distances(bias, run.shape[1]).to(wide)
        if window is not None:
            scores = scores.masked_fill(~within_window(run.shape[1], window, run.device), -torch.inf)
        probs = torch.softmax(scores, dim=-1, dtype=wide)
        probs = F.dropout(probs, dropout_p) if dropout_p else probs
        contexts.append((probs.to(v.dtype) @ v).transpose(1, 2).flatten(0, 1))
    return _with_tail(torch.cat(contexts) if contexts else qkv[:0, 0].clone(), len(qkv))


def bias_of_distances(bias: Tensor, length: int) -> Tensor:
    """The bias of each query and key, (H, L, L), from that of each distance, (H, 2P-1): column P - 1 + key - query."""
    middle = bias.shape[1] // 2
    return bias[:, middle - length + 1 : middle + length].unfold(1, length, 1).flip(1)


def within_window(length: int, window: int, device: torch.device) -> Tensor:
    """(L, L) bool: True where key and query are at most `window` apart."""
    place = torch.arange(length, device=device)
    return (place[:, None] - place).abs() <= window


def rotary(
    qkv: Tensor,  # (T, H + 2G, D)
    table: Tensor,  # (P, D): cosines of D / 2 angles, then their sines, in fp32
    positions: Tensor,  # (T,)
    num_heads: int,
) -> Tensor:  # (T, 3, H, D)
    """Rotary positions (Su et al., 2021) of queries and keys: columns i and i + D / 2 turn by the i-th angle.

    Keys and values of G heads are repeated for the H heads of queries.
    """
    groups = (qkv.shape[1] - num_heads) // 2
    wide = torch.promote_types(qkv.dtype, torch.float32)
    cos, sin = (part[:, None] for part in table[positions].to(wide).chunk(2, dim=1))
    q, k, v = qkv.split((num_heads, groups, groups), dim=1)

    def turned(x: Tensor) -> Tensor:
        a, b = x.to(wide).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    repeats = num_heads // groups
    k, v = (x if repeats == 1 else x.repeat_interleave(repeats, dim=1) for x in (turned(k), v))
    return torch.stack([turned(q), k, v], dim=1)


def is_transformed() -> bool:
    """True if torch.func or forward-mode differentiation is active; fused attention supports neither."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def attention_bwd(
    dout: Tensor,  # (T, H, D)
    qkv: Tensor,  # (T, 3, H, D)
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:  # (T, 3, H, D)
    """The gradient of `attention` without dropout, from its input alone (Dao et al., 2022, appendix B.2)."""
    return attention_gradients(dout, qkv, cu_seqlens, scale, None, window)[0]


def attention_gradients(
    dout: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    bias: Tensor | None,
    window: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of qkv and of the bias, as `attention_bwd`."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(qkv.dtype, torch.float32)
    parts, dbias = list[Tensor](), None if bias is None else torch.zeros_like(bias, dtype=wide)
    for run, drun in zip(_blocks(qkv, cu_seqlens), _blocks(dout, cu_seqlens), strict=True):
        q, k, v = run.permute(2, 0, 3, 1, 4)  # each (N, H, L, D)
        do, length = drun.transpose(1, 2), run.shape[1]
        scores = q @ k.mT * scale
        scores = scores if bias is None else scores.to(wide) + bias_of_distances(bias, length).to(wide)
        if window is not None:
            scores = scores.masked_fill(~within_window(length, window, run.device), -torch.inf)
        p = torch.softmax(scores, dim=-1, dtype=wide)
        dp = (do @ v.mT).to(p.dtype)
        dscores = p * (dp - (p * dp).sum(-1, keepdim=True))
        ds = (dscores * scale).to(q.dtype)
        dv = p.to(q.dtype).mT @ do
        parts.append(torch.stack([ds @ k, ds.mT @ q, dv]).permute(1, 3, 0, 2, 4).flatten(0, 1))
        if dbias is not None:
            middle = dbias.shape[1] // 2
            dbias[:, middle - length + 1 : middle + length] += _sums_of_distances(dscores.sum(0))
    dqkv = _with_tail(torch.cat(parts) if parts else torch.empty_like(qkv[:0]), len(qkv))
    return dqkv, dbias if dbias is None or bias is None else dbias.to(bias.dtype)


def _sums_of_distances(x: Tensor) -> Tensor:
    """The sums of x (H, L, L) over its diagonals, (H, 2L-1): column L - 1 + key - query."""
    L = x.shape[1]
    # Row r of the flipped matrix, moved r columns to the right: each diagonal becomes a column.
    moved = F.pad(x.flip(1), (0, L)).flatten(1)[:, : L * (2 * L - 1)].unflatten(1, (L, 2 * L - 1))
    return moved.sum(1)


def _blocks(x: Tensor, cu_seqlens: Tensor) -> Iterator[Tensor]:
    """`_equal_length_runs`, split into parts of at most _SCORES scores, or of one sequence."""
    for run in _equal_length_runs(x, cu_seqlens):
        yield from run.split(max(_SCORES // (run.shape[1] ** 2 * x.shape[-2]), 1))


def padded_attention(
    qkv: Tensor,  # (B, S, 3, H, D)
    mask: Tensor,  # (B, S) bool, True at real tokens
    *,
    queries: Tensor | None = None,  # (B, S) bool
    dropout_p: float = 0.0,
    bias: Tensor | None = None,  # (H, 2P-1), as for `attention`
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with explicit probabilities: returns the context (B, S, H, D) and the probabilities (B, H, S, S).

    All columns are queries, pads included, unless `queries` excludes them; only real tokens are keys. A row without a
    real token yields zeros.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, S, D)
    keys = mask[:, None, None, :]
    keys = keys if window is None else keys & within_window(qkv.shape[1], window, qkv.device)
    scores = q @ k.mT * qkv.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias_of_distances(bias, qkv.shape[1]).to(q.dtype)
    scores = scores.masked_fill(~keys, torch.finfo(q.dtype).min)
    probs = torch.softmax(scores, dim=-1).to(v.dtype).masked_fill(~keys, 0.0)
    probs = probs if queries is None else probs.masked_fill(~queries[:, None, :, None], 0.0)
    probs = F.dropout(probs, dropout_p) if dropout_p else probs
    return (probs @ v).transpose(1, 2), probs


def attention_to_keys(
    qkv: Tensor,  # (B, S, 3, H, D)
    keys: Tensor,  # (B, S) bool
    *,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,  # (H, 2P-1), as for `attention`
    window: int | None = None,
) -> Tensor:  # (B, S, H, D)
    """Attention of every column to the columns of its row where `keys` is True; to all of them if it has none."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, S, D)
    mask = keys[:, None, None, :]
    mask = mask if window is None else mask & within_window(qkv.shape[1], window, qkv.device)
    mask = mask | ~mask.any(-1, keepdim=True)
    if bias is not None:
        mask = torch.where(mask, bias_of_distances(bias, qkv.shape[1]).to(q.dtype), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p).transpose(1, 2)


def add_layer_norm(
    x: Tensor,  # (T, E)
    residual: Tensor | None,  # (T, E)
    weight: Tensor,  # (E,)
    bias: Tensor | None,  # (E,)
    *,
    eps: float,
    dropout_p: float = 0.0,
    rms: bool = False,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (T, E), with the sum (T, E) if `return_sum`
    x = F.dropout(x, dropout_p) if dropout_p else x
    x = x if residual is None else x + residual
    y = rms_norm(x, weight, eps) if rms else layer_norm(x, weight, bias, eps)
    return (y, x) if return_sum else y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich, 2019), in fp32 at least."""
    rows = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return (rows * weight.to(rows.dtype)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension; the gradients of weight and bias are summed in at least fp32.

    torch sums them over the rows in the dtype of x, which in bf16 on a CPU loses most of them.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if x.dtype != wide and torch.is_grad_enabled() and trained:
        rows = x.float()
        rows = rows - rows.mean(-1, keepdim=True).detach()  # same result, without the digits that a large mean costs
        weight, bias = weight.float(), None if bias is None else bias.float()
        return F.layer_norm(rows, weight.shape, weight, bias, eps).to(x.dtype)
    if weight.dtype not in (x.dtype, wide) or (bias is not None and bias.dtype != weight.dtype):
        weight, bias = weight.to(wide), None if bias is None else bias.to(wide)  # F.layer_norm rejects the others
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def linear_cross_entropy(
    x: Tensor,  # (T, E)
    weight: Tensor,  # (V, E)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,)
    *,
    ignore_index: int = -100,
) -> Tensor:  # ()
    if torch.compiler.is_compiling():  # a compiled graph must not depend on the number of labels
        return F.cross_entropy(F.linear(x, weight, bias), labels.long(), ignore_index=ignore_index)
    kept = (labels != ignore_index).nonzero().squeeze(1)
    x, labels = x.index_select(0, kept), labels.index_select(0, kept).long()
    total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    for rows, targets in zip(x.split(_LOSS_ROWS), labels.split(_LOSS_ROWS), strict=True):
        if is_transformed():
            total = total + _cross_entropy_sum(rows, weight, bias, targets)
            continue
        # A checkpoint saves x, not the logits: the backward recomputes them, a block of rows at a time.
        total = total + torch.utils.checkpoint.checkpoint(
            _cross_entropy_sum, rows, weight, bias, targets, use_reentrant=False, preserve_rng_state=False
        )
    return (total / len(labels)).to(x.dtype)


def _cross_entropy_sum(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def _equal_length_runs(x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Views of a packed row: each run of N adjacent sequences of one length L as (N, L, ...).

    No score matrix spans two sequences, and a batch of one length is a single run.
    """
    runs = [(length, len(list(group))) for length, group in groupby(cu_seqlens.diff().tolist())]
    sizes = [length * count for length, count in runs]
    parts = x[: sum(sizes)].split(sizes)
    return [part.unflatten(0, (count, length)) for part, (length, count) in zip(parts, runs, strict=True) if length]


def _with_tail(x: Tensor, tokens: int) -> Tensor:
    """x padded with zeros to `tokens` rows."""
    tail = tokens - len(x)
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, tail)) if tail else x


def pack_mask(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (B, S)
    """`ops.pack_mask`: positions of the real tokens, in tensors whose shapes do not depend on the mask's values."""
    real = (mask == 1).reshape(-1)
    bad = (mask != 0).reshape(-1) & ~real
    position = torch.arange(mask.numel(), device=mask.device)
    ends = F.pad(real.cumsum(0), (1, 0))  # real tokens before each position, and at the end T
    before, total = ends[:-1], ends[-1]
    places = torch.where(real, before, -1)
    # Real tokens in their order, then the pads in theirs.
    slots = torch.where(real, before, total + position - before)
    indices = torch.empty_like(position).scatter_(0, slots, torch.where(real, position, -1))
    rows = torch.arange(mask.shape[0] + 1, device=mask.device) * mask.shape[1]
    return ends[rows].to(torch.int32), indices, places, bad.any().to(torch.int32)[None]


def gather_rows(x: Tensor, index: Tensor, *, fill: float = 0.0) -> Tensor:  # (N, ...), (M,)
    if not len(x):
        return x.new_full((len(index), *x.shape[1:]), fill)
    inside = (index >= 0) & (index < len(x))
    rows = x.index_select(0, index.clamp(0, len(x) - 1))
    return torch.where(
        inside.view(-1, *[1] * (x.dim() - 1)), rows, torch.full((), fill, dtype=x.dtype, device=x.device)
    )
