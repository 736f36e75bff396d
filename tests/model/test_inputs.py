"""Bad arguments: one ValueError that names argument, value and limit, before any op runs."""

import pytest
import torch
from support import TINY, mask_of, tokens

import fastbert
from fastbert import ops

IDS = tokens()
NAN_MASK = torch.ones(3, 8)
NAN_MASK[0, 3] = float("nan")


def with_id(value, dtype=torch.int64):
    ids = IDS.clone()
    ids[1, 2] = value
    return ids.to(dtype)


CASES = {
    "id above": (
        {"input_ids": with_id(120)},
        "input_ids holds 120; vocab_size is 120, so 0 to 119 are valid",
    ),
    "id below": ({"input_ids": with_id(-1)}, "input_ids holds -1; vocab_size is 120"),
    "float ids": ({"input_ids": IDS.float()}, "input_ids has dtype torch.float32; it must be int64 or int32"),
    "1-D ids": ({"input_ids": IDS[0]}, r"input_ids has shape \(8,\); it must be \(batch, sequence\)"),
    "mask shape": (
        {"attention_mask": torch.ones(3, 7)},
        r"attention_mask has shape \(3, 7\); it must be that of input_ids, \(3, 8\)",
    ),
    "4-D mask": ({"attention_mask": torch.ones(3, 1, 8, 8)}, r"attention_mask has shape \(3, 1, 8, 8\)"),
    "NaN mask": ({"attention_mask": NAN_MASK}, "attention_mask holds nan; its values must be 0 or 1"),
    "additive mask": ({"attention_mask": torch.full((3, 8), -1e4)}, "attention_mask holds -10000.0"),
    "type above": ({"token_type_ids": with_id(2)}, "token_type_ids holds 1[0-9]+; type_vocab_size is 2"),
    "type shape": ({"token_type_ids": IDS[:2]}, r"token_type_ids has shape \(2, 8\); it must be \(3, 8\)"),
    "position above": (
        {"position_ids": torch.full((3, 8), 40)},
        "position_ids holds 40; max_position_embeddings is 40, so 0 to 39 are valid",
    ),
    "too long": (
        {"input_ids": tokens(2, 41)},
        "input_ids has a sequence of 41 tokens; max_position_embeddings is 40",
    ),
    "a list": ({"input_ids": [[1, 2]]}, "input_ids is a list; it must be a tensor"),
    "mask as a list": ({"attention_mask": [[1] * 8] * 3}, "attention_mask is a list; it must be a tensor"),
    "both inputs": ({"inputs_embeds": torch.zeros(3, 8, 48)}, "exactly one of input_ids and inputs_embeds"),
    "no input": ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
    "embeds width": (
        {"input_ids": None, "inputs_embeds": torch.zeros(3, 8, 47)},
        r"inputs_embeds has shape \(3, 8, 47\).*with 48 columns",
    ),
    "packed with mask": (
        {"input_ids": IDS[0], "cu_seqlens": torch.tensor([0, 8]), "attention_mask": torch.ones(1, 8)},
        "attention_mask and cu_seqlens are both given",
    ),
    "packed 2-D": (
        {"cu_seqlens": torch.tensor([0, 8])},
        r"input_ids has shape \(3, 8\); it must be \(tokens,\)",
    ),
    "packed too long": (
        {"input_ids": tokens(1, 41)[0], "cu_seqlens": torch.tensor([0, 41])},
        "a sequence of 41 tokens; max_position_embeddings is 40",
    ),
}


@pytest.fixture
def refuse_ops(monkeypatch):
    """Any op that runs fails the test."""
    for name in ("embed_layer_norm", "linear", "attention", "encoder"):

        def run(*args, name=name, **kwargs):
            raise AssertionError(f"{name} ran")

        monkeypatch.setattr(ops, name, run)


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments(case, refuse_ops):
    arguments, message = CASES[case]
    model = fastbert.BertModel(fastbert.BertConfig(**TINY))
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS, **arguments})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_dtypes(dtype):
    model = fastbert.BertModel(fastbert.BertConfig(**TINY)).eval()
    assert torch.equal(model(IDS.to(dtype))[0], model(IDS)[0])


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        ("BertForMaskedLM", {"labels": with_id(120)}, "labels holds 120; the number of classes is 120"),
        ("BertForMaskedLM", {"labels": IDS[:2]}, r"labels has shape \(2, 8\); it must be \(3, 8\)"),
        ("BertForTokenClassification", {"labels": with_id(-3) % 2 - 3}, "labels holds -3"),
        ("BertForSequenceClassification", {"labels": torch.tensor([0, 1, 2])}, "labels holds 2; .* is 2"),
        ("BertForNextSentencePrediction", {"labels": torch.tensor([0, 5, 1])}, "labels holds 5"),
    ],
)
def test_bad_labels(head, labels, message):
    model = getattr(fastbert, head)(fastbert.BertConfig(**TINY))
    with pytest.raises(ValueError, match=message):
        model(IDS, **labels)


def test_unknown_argument_is_a_type_error():
    model = fastbert.BertForMaskedLM(fastbert.BertConfig(**TINY))
    with pytest.raises(TypeError, match="attention_masks"):
        model(IDS, attention_masks=mask_of("ones"))
