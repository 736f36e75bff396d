"""transformers' EncoderDecoderModel with a BERT on each side: the encoder runs packed, the rest is untouched."""

import copy

import pytest
import torch
import transformers
from support import mask_of

import fastbert

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**SIZES), transformers.BertConfig(**SIZES)
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    found = transformers.EncoderDecoderModel(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(0, 0.2)
    return found


def inputs():
    mask = mask_of("right")
    ids = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask}


def test_generation_is_the_same(model):
    fast = fastbert.accelerate(copy.deepcopy(model))
    options = {"max_new_tokens": 12, "num_beams": 2, "do_sample": False}
    assert torch.equal(fast.generate(**inputs(), **options), model.generate(**inputs(), **options))
    report = str(fastbert.explain(fast))
    assert ("packed, by fastbert" in report and "is_decoder" in report) or "decoder" in report
    assert "calls ran the original code" not in report


def test_training_is_the_same(model):
    fast, labels = fastbert.accelerate(copy.deepcopy(model)), torch.randint(5, 60, (3, 6))
    losses = []
    for each in (fast, model):
        each.zero_grad()
        loss = each(**inputs(), labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    total = sum(p.grad.norm() ** 2 for p in model.parameters() if p.grad is not None).sqrt()
    for (name, mine), theirs in zip(fast.named_parameters(), model.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            assert (mine.grad - theirs.grad).norm() <= 1e-5 * total, name
