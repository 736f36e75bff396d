"""embed_layer_norm: y = dropout(LN(word[id] + token_type[id] + position[id])), the bottom of a BERT."""

from __future__ import annotations

from torch import Tensor

from fastbert import backend, reference
from fastbert.ops._checks import check_integer, check_probability, check_shape

backend.implement("embed_layer_norm", "reference", reference.embed_layer_norm)


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
    padding_idx: int | None = None,
) -> Tensor:
    """Gathers three tables, adds them, normalises: (T,) ids -> (T, E).

    Args:
        input_ids, token_type_ids, position_ids: (T,) int64, within their tables (the caller checks the range).
        word, token_type, position: tables (V, E), (types, E), (P, E) of one dtype.
        weight, bias: the LayerNorm's, (E,).
        padding_idx: the row of `word` that receives no gradient.

    Raises:
        ValueError: a shape, dtype or probability that does not fit.
    """
    op, width = "embed_layer_norm", word.shape[-1]
    check_shape(op, "input_ids", input_ids, (None,))
    for name, ids in (
        ("input_ids", input_ids),
        ("token_type_ids", token_type_ids),
        ("position_ids", position_ids),
    ):
        check_shape(op, name, ids, (input_ids.shape[0],))
        check_integer(op, name, ids)
    for name, table in (("word", word), ("token_type", token_type), ("position", position)):
        check_shape(op, name, table, (None, width))
    check_shape(op, "weight", weight, (width,))
    check_shape(op, "bias", bias, (width,))
    check_probability(op, "dropout_p", dropout_p)
    args = (input_ids, token_type_ids, position_ids, word, token_type, position, weight, bias)
    kwargs = {"eps": eps, "dropout_p": dropout_p, "padding_idx": padding_idx}
    _, run = backend.choose(op, word.device.type, *args, **kwargs)
    return run(*args, **kwargs)
