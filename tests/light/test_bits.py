"""The light engine has the bits of the torch path: every family, with each head that it has, in every precision."""

import numpy as np
import pytest
import torch
from support import require_native
from test_families_live import CASES, make

import fastbert
from fastbert.config import BertConfig
from fastbert.light.classifiers import TASKS
from fastbert.light.heads import Head
from fastbert.light.loading import load_encoder

HEADS = {
    "Model": fastbert.AutoModel,
    "ForSequenceClassification": fastbert.AutoModelForSequenceClassification,
    "ForTokenClassification": fastbert.AutoModelForTokenClassification,
    "ForMaskedLM": fastbert.AutoModelForMaskedLM,
}
TASK = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
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
    kind = TASKS[TASK[head]]
    parts = kind.parts(config)
    options = {"dtype": dtype, "quantize": quantize, "head": parts}
    pooler = not kind.of_tokens and parts.reads == "pooler"
    classes = Head(load_encoder(tmp_path, config, with_pooler=pooler, **options), parts)
    if not kind.of_tokens:
        same(classes.of_texts(*given), expected.logits)
        states = classes.encoder(*given)
        same(classes.of_states(states, given[1]), expected.logits)
        return
    same(classes.of_tokens(*given), expected.logits)
    if head == "ForMaskedLM":
        places = np.array([0, 5, 9])
        same(classes.of_places(*given, places), expected.logits[places])
        largest = [logits.amax(0) for logits in expected.logits.split(LENGTHS)]
        same(classes.largest(*given), torch.stack(largest))


def same(found, expected):
    expected = expected.float().numpy()
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.isfinite(found).all() and (found == expected).all(), np.abs(found - expected).max()
