"""Every family of encoders, live: an accelerated model gives what transformers gives, packed, with every head."""

import copy
import itertools

import pytest
import torch
import transformers
from support import mask_of

import fastbert
from fastbert.families import FAMILIES

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SIZES = {**WIDTHS, "vocab_size": 120, "max_position_embeddings": 40}
ROBERTA = {**SIZES, "type_vocab_size": 1, "pad_token_id": 1}
DISTILBERT = {
    "vocab_size": 120,
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 40,
}
SPECIAL = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
MODERNBERT = {**SIZES, **SPECIAL}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True, "decoder_bias": False}
BIASES |= {"classifier_pooling": "mean", "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EUROBERT = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3}
CONFIGS = {
    "bert": ("Bert", SIZES),
    "roberta": ("Roberta", ROBERTA),
    "xlm-roberta": ("XLMRoberta", ROBERTA),
    "camembert": ("Camembert", ROBERTA),
    "distilbert": ("DistilBert", DISTILBERT),
    "mpnet": ("MPNet", {**SIZES, "pad_token_id": 1}),
    "electra": ("Electra", {**SIZES, "embedding_size": 16}),
    "electra of one width": ("Electra", {**SIZES, "embedding_size": 32}),
    "nomic_bert": ("NomicBert", SIZES),
    "gte": ("Gte", {**SIZES, "pad_token_id": 1}),
    "gte without types": ("Gte", {**SIZES, "type_vocab_size": 0, "pad_token_id": 0}),
    "jina_embeddings_v3": ("JinaEmbeddingsV3", ROBERTA),
    "modernbert": ("ModernBert", {**MODERNBERT, "local_attention": 4}),
    "modernbert with biases": ("ModernBert", {**MODERNBERT, **BIASES, "local_attention": 6}),
    "eurobert": ("EuroBert", {**EUROBERT, "num_key_value_heads": 2}),
    "eurobert by mean": ("EuroBert", {**EUROBERT, "classifier_pooling": "mean", "mlp_bias": True}),
}
HEADS = ("Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification")
HEADS += ("ForQuestionAnswering", "ForMultipleChoice")
CASES = [(name, head) for name in CONFIGS for head in HEADS if hasattr(transformers, CONFIGS[name][0] + head)]
HOLES = torch.tensor([[1, 0, 1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 1, 1, 1, 0], [1] * 8])


def test_every_family_is_tried():
    assert {name.partition(" ")[0] for name in CONFIGS} == FAMILIES.keys() - {"jina_bert"}  # transformers has it not
    assert len(CASES) == 6 * 8 + 3 + 3 * 4 + 5 + 2 * 6 + 2 * 4


def make(name, head="Model", **changes):
    prefix, sizes = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, **changes})
    model = getattr(transformers, prefix + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def twins(name, head="Model", **changes):
    original = make(name, head, **changes)
    return fastbert.accelerate(copy.deepcopy(original)), original


def given(model, head, kind):
    """Ids with pads where the mask has them, and the mask."""
    ids = torch.randint(5, 120, (3, 8), generator=torch.Generator().manual_seed(1))
    mask = HOLES if kind == "holes" else mask_of(kind)  # no row begins with a pad
    if mask is not None:
        ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    several = (lambda x: x[:, None].repeat(1, 2, 1)) if head == "ForMultipleChoice" else (lambda x: x)
    return {"input_ids": several(ids), "attention_mask": None if mask is None else several(mask)}


def fallbacks(model):
    return [line.strip() for line in str(fastbert.explain(model)).splitlines() if "ran the original code" in line]


def real(x, inputs, head):
    """The values of an output at real tokens; all where it has none."""
    mask = inputs["attention_mask"]
    return x if mask is None or head == "ForMultipleChoice" or x.shape[:2] != mask.shape else x[mask == 1]


def close(a, b, where=""):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m: f"{where}: {m}")


@pytest.mark.parametrize(("name", "head"), CASES)
def test_outputs(name, head):
    fast, original = twins(name, head)
    kinds = ["absent", "ones", "right", "holes"]
    if (name, head) == ("modernbert with biases", "ForMultipleChoice"):
        kinds.remove("absent")  # transformers takes the mean by the mask, which it needs
    for kind, grad in itertools.product(kinds, [False, True]):
        inputs = given(original, head, kind)
        with torch.set_grad_enabled(grad):
            a, b = fast(**inputs), original(**inputs)
        assert type(a) is type(b) and list(a) == list(b) and not fallbacks(fast), (kind, grad)
        for field in a:
            close(real(a[field], inputs, head), real(b[field], inputs, head), (kind, grad, field))


def labels_for(model, head, inputs):
    """Labels of a head, for losses; none at pads."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    draw = torch.Generator().manual_seed(4)
    if head == "ForMultipleChoice":  # other words for the second choice: gradients of two alike cancel out
        ids[:, 1] = torch.where(ids[:, 1] > 4, 124 - ids[:, 1], ids[:, 1])
    if head == "ForQuestionAnswering":
        return {f"{side}_positions": torch.tensor([1, 2, 0]) for side in ("start", "end")}
    if head in ("ForSequenceClassification", "ForMultipleChoice"):
        return {"labels": torch.tensor([0, 1, 1])}
    electra = type(model).__name__ == "ElectraForPreTraining"
    words = head == "ForMaskedLM" or (head == "ForPreTraining" and not electra)
    labels = torch.randint(0, model.config.vocab_size if words else 2, ids.shape, generator=draw)
    labels = labels if mask is None or electra else labels.masked_fill(mask == 0, -100)
    both = {"next_sentence_label": torch.tensor([0, 1, 1])} if head == "ForPreTraining" and not electra else {}
    return {"labels": labels, **both}


LOSSES = [(name, head) for name, head in CASES if head != "Model"]


@pytest.mark.parametrize(("name", "head"), LOSSES)
def test_losses(name, head):
    """To 1e-5, and their gradients, all together, to 1e-5, or to twice eager's own error against fp64."""
    fast, original = twins(name, head)
    exact = copy.deepcopy(original).double()
    # transformers lets pads into the softmax over positions of answers, with states of their own.
    inputs = given(original, head, "ones" if head == "ForQuestionAnswering" else "right")
    labels = labels_for(original, head, inputs)
    losses = [model(**inputs, **labels).loss for model in (fast, original, exact)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5) and not fallbacks(fast)
    assert gradient_error(fast, original, exact, losses) <= 1


def gradient_error(fast, original, exact, losses):
    """The distance of all gradients of `fast` from those of `original`, as a share of what is allowed."""
    for loss in losses:
        loss.backward()
    ours, theirs, right = (
        {name: p.grad.double() for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
        for model in (fast, original, exact)
    )
    assert ours.keys() == theirs.keys() == right.keys()

    def distance(a, b):
        return sum((a[name] - b[name]).norm() ** 2 for name in a).sqrt()

    size = sum(x.norm() ** 2 for x in right.values()).sqrt()
    return float(distance(ours, theirs) / max(1e-5 * size, 2 * distance(theirs, right)))


@pytest.mark.parametrize(("name", "head"), CASES)
def test_gradients(name, head):
    """Of each parameter, held to eager's own error against fp64."""
    fast, original = twins(name, head)
    exact = copy.deepcopy(original).double()
    inputs = given(original, head, "right")
    for model in (fast, original, exact):
        output = next(iter(model(**inputs).values()))
        real(output, inputs, head).square().mean().backward()
    total = sum(p.grad.norm() ** 2 for p in exact.parameters() if p.grad is not None).sqrt()
    for (where, p), q, r in zip(exact.named_parameters(), fast.parameters(), original.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (r.grad is None), where
        if p.grad is not None:
            ours, theirs = ((x.grad - p.grad).norm() / total for x in (q, r))
            assert ours <= 2 * theirs + 1e-5, where


@pytest.mark.parametrize("name", CONFIGS)
def test_states_and_attentions(name):
    fast, original = twins(name, attn_implementation="eager")
    inputs = given(original, "Model", "right")
    a, b = (m(**inputs, output_hidden_states=True, output_attentions=True) for m in (fast, original))
    assert list(a) == list(b) and not fallbacks(fast)
    mask = inputs["attention_mask"] == 1
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        close(x[mask], y[mask])
    for x, y in zip(a.attentions, b.attentions, strict=True):
        close(x.transpose(1, 2)[mask], y.transpose(1, 2)[mask])


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_in_place_of_ids(name):
    fast, original = twins(name)
    embeds = original.get_input_embeddings()(given(original, "Model", "absent")["input_ids"]).detach()
    mask = mask_of("right")
    a, b = (m(inputs_embeds=embeds, attention_mask=mask).last_hidden_state for m in (fast, original))
    close(a[mask == 1], b[mask == 1])
    windows = "may see no key within its window" in str(fallbacks(fast))  # without ids, a masked one may be no pad
    assert windows if "modernbert" in name else not fallbacks(fast)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForTokenClassification"])
def test_a_row_that_begins_with_a_pad(name, head):
    """Its state is read by a head for classes or a pooler: then the original code runs."""
    fast, original = twins(name, head)
    inputs = given(original, head, "left")
    a, b = fast(**inputs), original(**inputs)
    for field in a:
        close(real(a[field], inputs, head), real(b[field], inputs, head))
    pooling = getattr(original.config, "classifier_pooling", "cls")
    reads_first = head == "ForSequenceClassification" and pooling in ("cls", "bos")
    reads_first = reads_first or (head == "Model" and "pooler_output" in b)
    assert bool(fallbacks(fast)) == reads_first


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "camembert"])
@pytest.mark.parametrize("grad", [False, True])
def test_positions_count_tokens_that_are_not_padding(name, grad):
    """Whatever the mask says: padding within a text takes no position, a masked token does."""
    fast, original = twins(name)
    ids = torch.randint(5, 120, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[0, 3] = ids[1, :2] = 1
    masks = [None, torch.ones_like(ids), torch.ones_like(ids)]
    masks[2][0, 5] = masks[2][1, 7:] = 0
    with torch.set_grad_enabled(grad):
        for mask in masks:
            a, b = (m(ids, attention_mask=mask).last_hidden_state for m in (fast, original))
            close(a, b)
    assert not fallbacks(fast)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_beyond_the_last_position(name):
    fast, original = twins(name)
    family = FAMILIES[name.partition(" ")[0]]
    longest = 40 - family.first_position(original)
    ids = torch.full((1, longest + 1), 7)
    close(fast(ids[:, :longest]).last_hidden_state, original(ids[:, :longest]).last_hidden_state)
    if family.rotary is not None:  # transformers turns by any position
        close(fast(ids).last_hidden_state, original(ids).last_hidden_state)
        far = torch.full_like(ids, 50)
        close(fast(ids, position_ids=far).last_hidden_state, original(ids, position_ids=far).last_hidden_state)
        assert "it has 41 tokens; max_position_embeddings is 40" in str(fallbacks(fast))
        assert "position_ids holds 50; max_position_embeddings is 40" in str(fallbacks(fast))
        return
    with pytest.raises(ValueError, match=f"a sequence of {longest + 1} tokens; max_position_embeddings is 40"):
        fast(ids)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("setting", [{"quantize": "int8"}, {"dtype": torch.bfloat16}])
def test_lower_precisions(name, setting):
    original = make(name)
    fast = fastbert.accelerate(copy.deepcopy(original), **setting)
    inputs = given(original, "Model", "right")
    with torch.no_grad():
        a, b = (m(**inputs).last_hidden_state[inputs["attention_mask"] == 1].float() for m in (fast, original))
    assert (a - b).norm() < 0.05 * b.norm()
    assert not fallbacks(fast)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hook_inside_runs_the_original_code(name):
    fast, original = twins(name)
    family = FAMILIES[name.partition(" ")[0]]
    for model in (fast, original):
        up = family.layers(model)[1].get_submodule(family.layer.up)
        up.register_forward_hook(lambda module, args, out: 2 * out)
    inputs = given(original, "Model", "right")
    mask = inputs["attention_mask"] == 1
    close(*(m(**inputs).last_hidden_state[mask] for m in (fast, original)))
    assert family.layer.up in str(fallbacks(fast))


@pytest.mark.parametrize("name", CONFIGS)
def test_restore(name):
    fast, original = twins(name)
    inputs = given(original, "Model", "right")
    assert not torch.equal(fast(**inputs).last_hidden_state, original(**inputs).last_hidden_state)
    fastbert.restore(fast)
    assert torch.equal(fast(**inputs).last_hidden_state, original(**inputs).last_hidden_state)


def test_an_unknown_family_is_named_with_those_that_are_known():
    model = transformers.AlbertModel(transformers.AlbertConfig(**WIDTHS, vocab_size=50))
    with pytest.raises(ValueError, match="AlbertModel without an encoder") as caught:
        fastbert.accelerate(model)
    assert all(family.base in str(caught.value) for name, family in FAMILIES.items() if name != "jina_bert")


def test_what_differs_in_a_class_of_berts_shape_is_said():
    class Embeddings(transformers.models.bert.modeling_bert.BertEmbeddings):
        pass

    class Lookalike(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.embeddings = Embeddings(config)
            self.encoder = transformers.models.bert.modeling_bert.BertEncoder(config)

    config = transformers.BertConfig(**WIDTHS, vocab_size=50)
    said = "of BERT's shape, but "
    for change, reason in (
        (lambda model: None, "its class is not transformers' BertModel"),
        (lambda model: model.encoder.layer[1].attention.add_module("gate", torch.nn.Linear(2, 2)), "has a gate, which"),
        (lambda model: delattr(model.embeddings, "token_type_embeddings"), "embeddings has no token_type_embeddings"),
    ):
        model = Lookalike(config)
        change(model)
        for function in (fastbert.accelerate, fastbert.explain):
            with pytest.raises(ValueError, match=f"Lookalike {said}.*{reason}"):
                function(model)


@pytest.mark.parametrize("kind", ["right", "holes", "left"])
@pytest.mark.parametrize("inside", [False, True])
def test_distances_are_those_of_the_columns(kind, inside):
    """Where attention has a bias by distance, masked positions between two tokens count, whatever they hold."""
    fast, original = twins("mpnet")
    inputs = given(original, "Model", kind)
    if inside:  # masked positions that are no pads
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 9)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            a, b = fast(**inputs).last_hidden_state, original(**inputs).last_hidden_state
        close(*(x[inputs["attention_mask"] == 1] for x in (a, b)))


def test_a_table_of_other_buckets_is_refused():
    fast, _ = twins("mpnet", relative_attention_num_buckets=16)
    with pytest.raises(ValueError, match="config: relative_attention_num_buckets is 16; fastbert knows 32"):
        fast(torch.tensor([[5, 6]]))
