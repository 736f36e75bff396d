"""Masked tokens, returned states and changed heads: an accelerated model gives what transformers gives."""

import copy
import sys

import pytest
import torch
import transformers
from support import MASKS, mask_of
from test_known_parts import IDS, MASK, PADDED, fallbacks, make, twins

import fastbert

KINDS = [kind for kind in MASKS if MASKS[kind] is not None]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", ["ids", "embeddings"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_have_states(kind, call):
    """They attend, and nothing attends to them, wherever they stand; a row of them alone has no keys, and no states."""
    fast, original = twins()
    mask = mask_of(kind)
    given = (
        {"input_ids": IDS} if call == "ids" else {"inputs_embeds": original.embeddings.word_embeddings(IDS).detach()}
    )
    a, b = (m(**given, attention_mask=mask, output_hidden_states=True) for m in (fast, original))
    rows = mask.any(1)
    close(a.last_hidden_state[rows], b.last_hidden_state[rows])
    close(a.pooler_output[rows], b.pooler_output[rows])
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        close(x[rows], y[rows])
    assert not a.last_hidden_state[~rows].any() and not fallbacks(fast)


@pytest.mark.parametrize("pad_id", [-1, None, 0, 5])
def test_which_masked_tokens_are_pads_is_the_models_setting(pad_id):
    fast, original = twins()
    fast.config.pad_token_id = original.config.pad_token_id = pad_id
    with torch.no_grad():
        a, b = (m(PADDED, attention_mask=MASK).last_hidden_state for m in (fast, original))
    computed = (MASK == 1) | ((-1 if pad_id is None else pad_id) != PADDED)
    close(a[computed], b[computed])
    assert not a[~computed].any()


def test_masked_tokens_between_pads():
    """Pads stay absent; the masked tokens next to them do not."""
    fast, original = twins()
    ids = IDS.clone()
    ids[1, 5:] = 0
    a, b = (m(ids, attention_mask=MASK).last_hidden_state for m in (fast, original))
    computed = (MASK == 1) | (ids != 0)
    close(a[computed], b[computed])
    assert not a[~computed].any()


def test_gradients_and_attentions_of_masked_tokens():
    fast, original = twins()
    original.set_attn_implementation("eager")
    results = []
    for model in (fast, original):
        out = model(IDS, attention_mask=MASK, output_attentions=True)
        again = model(IDS, attention_mask=MASK).last_hidden_state
        (out.last_hidden_state.square().sum() + again.sin().sum()).backward()
        results.append((out.attentions, [p.grad for p in model.parameters()]))
    for a, b in zip(*(attentions for attentions, _ in results), strict=True):
        close(a, b)
    for a, b in zip(*(gradients for _, gradients in results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_labels_at_masked_tokens_count_and_those_at_pads_do_not():
    fast, original = twins("BertForTokenClassification")
    ids = IDS.clone()
    ids[1, 5:] = 0
    labels = torch.ones_like(ids)
    expected = original(ids, attention_mask=MASK, labels=labels.masked_fill((MASK == 0) & (ids == 0), -100)).loss
    close(fast(ids, attention_mask=MASK, labels=labels).loss, expected)


def test_query_expansion_scores_as_before(minilm):
    """ColBERT's queries on real weights: mask tokens that no token attends to, scored by MaxSim."""
    original = transformers.BertModel.from_pretrained(minilm).eval()
    fast = fastbert.accelerate(copy.deepcopy(original))
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    query = tokenizer("who plays the guitar", return_tensors="pt")
    missing = 32 - query["input_ids"].shape[1]
    ids = torch.nn.functional.pad(query["input_ids"], (0, missing), value=tokenizer.mask_token_id)
    mask = torch.nn.functional.pad(query["attention_mask"], (0, missing))
    texts = tokenizer(["A man is playing a guitar.", "Stocks fell on Monday."], padding=True, return_tensors="pt")
    scores = []
    for model in (original, fast):
        with torch.no_grad():
            q = torch.nn.functional.normalize(model(ids, attention_mask=mask).last_hidden_state, dim=-1)
            d = torch.nn.functional.normalize(model(**texts).last_hidden_state, dim=-1)
        d = d * texts["attention_mask"][..., None]
        scores.append((q @ d.mT).amax(-1).sum(-1))
    close(*scores)
    assert scores[0][0] > scores[0][1] + 1


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("attentions", [False, True])
@pytest.mark.parametrize("mask", [None, MASK])
def test_returned_states_are_in_the_graph(own, attentions, mask, tmp_path):
    original = make("BertForSequenceClassification")
    original.set_attn_implementation("eager")
    if own:
        original.save_pretrained(tmp_path)
        model = fastbert.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    else:
        model = fastbert.accelerate(copy.deepcopy(original))
    gradients = []
    for each in (model, original):
        out = each(PADDED, attention_mask=mask, output_hidden_states=True, output_attentions=attentions)
        watched = [*out.hidden_states, *(out.attentions or ())]
        gradients.append(torch.autograd.grad(out.logits[:, 1].sum(), watched))
    for x, y in zip(*gradients, strict=True):
        assert y.abs().max() > 0
        real = slice(None)
        if mask is not None:  # transformers has gradients at pads, too
            real = (
                mask.bool() if x.dim() == 3 else (mask[:, None, :, None] * mask[:, None, None, :]).bool().expand_as(x)
            )
        close(x[real], y[real])


@pytest.mark.parametrize("own", [False, True])
def test_the_last_of_the_states_is_the_last_state(own, tmp_path):
    original = make()
    original.save_pretrained(tmp_path)
    model = fastbert.BertModel.from_pretrained(tmp_path) if own else fastbert.accelerate(original)
    with torch.no_grad():
        for options in ({}, {"output_attentions": True}):
            out = model(PADDED, attention_mask=MASK, output_hidden_states=True, **options)
            assert out.hidden_states[-1] is out.last_hidden_state


def cut_heads(model):
    """Leaves out the second and third of four heads of a layer, by hand."""
    attention = model.encoder.layer[1].attention
    width = attention.self.attention_head_size
    kept = torch.tensor([*range(width), *range(3 * width, 4 * width)])
    with torch.no_grad():
        for linear in (attention.self.query, attention.self.key, attention.self.value):
            linear.weight = torch.nn.Parameter(linear.weight[kept])
            linear.bias = torch.nn.Parameter(linear.bias[kept])
        attention.output.dense.weight = torch.nn.Parameter(attention.output.dense.weight[:, kept])


@pytest.mark.parametrize("when", ["before", "between calls"])
@pytest.mark.parametrize("grad", [False, True])
def test_heads_cut_out_by_hand(when, grad):
    fast, original = twins(change=cut_heads if when == "before" else None)
    with torch.set_grad_enabled(grad):
        if when != "before":
            fast(PADDED, attention_mask=MASK)
            cut_heads(fast), cut_heads(original)
        a, b = (m(PADDED, attention_mask=MASK).last_hidden_state for m in (fast, original))
    close(a[MASK == 1], b[MASK == 1])
    assert not fallbacks(fast)


def test_heads_are_counted_by_their_width():
    """num_attention_heads is read by nothing in transformers' attention."""
    fast, original = twins()
    for model in (fast, original):
        for layer in model.encoder.layer:
            layer.attention.self.num_attention_heads = 2
    close(fast(IDS).last_hidden_state, original(IDS).last_hidden_state)


def test_a_vocabulary_is_as_large_as_its_table():
    fast, original = twins()
    for model in (fast, original):
        table = model.embeddings.word_embeddings
        table.weight = torch.nn.Parameter(torch.cat([table.weight, table.weight[:30]]).detach())
    ids = IDS.clone()
    ids[0, 0] = 140
    close(fast(ids).last_hidden_state, original(ids).last_hidden_state)


def test_features_of_a_call_before_are_no_reason():
    fast, original = twins()
    extra = {"token_embeddings": torch.ones(3, 8, 4), "sentence_embedding": torch.ones(3, 4)}
    a, b = (m(PADDED, attention_mask=MASK, **extra).last_hidden_state for m in (fast, original))
    close(a[MASK == 1], b[MASK == 1])
    assert not fallbacks(fast)
    for name in ("is_causal", "scaling", "encoder_hidden_states"):
        try:
            fast(IDS, **{name: torch.ones(3, 8, 48) if "states" in name else 0.5})
        except (TypeError, ValueError):
            continue  # transformers' own error
    assert fallbacks(fast)


def test_sentence_transformers_called_twice_with_one_dictionary(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = fastbert.accelerate(sentence_transformers.SentenceTransformer(str(minilm), device="cpu"))
    features = model.preprocess(["A man is playing a guitar.", "Ok"])
    with torch.no_grad():
        first = model(features)["sentence_embedding"].clone()
        close(model(features)["sentence_embedding"], first)
    assert not fallbacks(model)


@pytest.mark.parametrize("mask", [[[1, 1, 1, 2, 2, 0, 0, 0], [1] * 8], [[1, 0.5, 1, 1, 1, 0, 0, 0], [1.0] * 8]])
def test_masks_of_other_values_run_the_original(mask):
    fast, original = twins()
    a, b = (m(IDS[:2], attention_mask=torch.tensor(mask)).last_hidden_state for m in (fast, original))
    assert torch.equal(a, b)
    assert "attention_mask holds other values than 0 and 1" in fallbacks(fast)[0]


def test_compiles_whole_with_a_mask():
    fast, original = twins()
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(PADDED, attention_mask=MASK)[0], original(PADDED, attention_mask=MASK)[0])


def test_transformers_imported_a_second_time_changes_nothing():
    from pathlib import Path

    from transformers.utils.import_utils import direct_transformers_import

    fast, _ = twins()
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "transformers"}
    try:
        direct_transformers_import(Path(transformers.__file__).parent)
        with torch.no_grad():
            fast(PADDED, attention_mask=MASK)
    finally:
        sys.modules.update(before)
    assert not fallbacks(fast)


def test_flop_counters_see_what_they_see_in_transformers():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in twins():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(PADDED, attention_mask=MASK)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
