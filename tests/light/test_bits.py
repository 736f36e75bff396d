"""The light engine has the bits of the torch path: every family, with each head that it has, in every precision."""

import numpy as np
import pytest
import torch
from support import require_native
from test_families_live import CASES, make

import fastbert
from fastbert.config import BertConfig, family_of
from fastbert.light.heads import Head, pools
from fastbert.light.loading import load_encoder

HEADS = {
    "Model": fastbert.AutoModel,
    "ForSequenceClassification": fastbert.AutoModelForSequenceClassification,
    "ForTokenClassification": fastbert.AutoModelForTokenClassification,
}
OWN = [(name, head) for name, head in CASES if head in HEADS]
PRECISIONS = [("float32", None), ("bfloat16", None), ("float32", "int8")]
LENGTHS = [7, 1, 20, 3]


@pytest.fixture(autouse=True)
def _native():
    require_native()


def packed(config):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, config.vocab_size, (sum(LENGTHS),), generator=generator)
    ids[5] = config.pad_token_id or 0  # may stand in a text
    cu_seqlens = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    return ids, cu_seqlens


@pytest.mark.parametrize(("dtype", "quantize"), PRECISIONS, ids=str)
@pytest.mark.parametrize(("name", "head"), OWN, ids=str)
def test_bits(name, head, dtype, quantize, tmp_path):
    make(name, head).save_pretrained(tmp_path)
    options = {"dtype": getattr(torch, dtype), "quantize": quantize}
    model = HEADS[head].from_pretrained(tmp_path, **options)
    ids, cu_seqlens = packed(model.config)
    with torch.inference_mode():
        expected = model(ids, cu_seqlens=cu_seqlens, max_seqlen=max(LENGTHS))
    config = BertConfig.from_pretrained(tmp_path)
    given = ids.numpy(), cu_seqlens.numpy()
    if head == "Model":
        pooler = model.pooler is not None
        encoder = load_encoder(tmp_path, config, dtype=dtype, quantize=quantize, with_pooler=pooler)
        states = encoder(*given)
        same(encoder.float32(states), expected.last_hidden_state)
        first = given[1][:-1].astype(np.int64)
        same(encoder.float32(encoder(*given, picked=first)), expected.last_hidden_state[first])
        if pooler:
            same(encoder.float32(encoder.pooled(states[first])), expected.pooler_output)
        return
    family = family_of(config.model_type)
    names = family.classes if head == "ForSequenceClassification" else family.tokens
    encoder = load_encoder(
        tmp_path,
        config,
        dtype=dtype,
        quantize=quantize,
        with_pooler=head == "ForSequenceClassification" and pools(names),
        head=names,
        count=config.num_labels,
    )
    classes = Head(encoder, names, config.num_labels)
    found = classes.of_texts(*given) if head == "ForSequenceClassification" else classes.of_tokens(*given)
    same(found, expected.logits)


def same(found, expected):
    expected = expected.float().numpy()
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.isfinite(found).all() and (found == expected).all(), np.abs(found - expected).max()
