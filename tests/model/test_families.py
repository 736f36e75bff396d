"""Every family of encoders without transformers: the same numbers, and the same folder, bit for bit, both ways."""

import copy
import itertools

import pytest
import torch
import transformers
from test_families_live import CASES, CONFIGS, LOSSES, given, gradient_error, labels_for, make, real

import fastbert

OURS = {head: getattr(fastbert, f"AutoModel{head.removeprefix('Model')}", None) for _, head in CASES}
OWN = [(name, head) for name, head in CASES if OURS[head] is not None]


@pytest.fixture
def pair(request, tmp_path):
    """transformers' model, and fastbert's from the folder that it saved."""
    name, head = request.param
    theirs = make(name, head)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, OURS[head].from_pretrained(tmp_path / "theirs"), head


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_every_head_of_every_family_is_tried():
    assert len(OWN) == len(CASES)


@pytest.mark.parametrize("pair", OWN, indirect=True, ids=str)
def test_outputs(pair):
    theirs, ours, head = pair
    for kind, grad in itertools.product(("absent", "right", "holes"), (False, True)):
        if head == "ForMultipleChoice" and kind == "absent" and getattr(theirs.config, "norm_bias", False):
            continue  # transformers takes the mean by the mask, which it needs
        inputs = given(theirs, head, kind)
        with torch.set_grad_enabled(grad):
            a, b = ours(**inputs), theirs(**inputs)
        assert list(a) == list(b)
        for field in b:
            close(real(a[field], inputs, head), real(b[field], inputs, head))


@pytest.mark.parametrize("pair", [case for case in OWN if case in LOSSES], indirect=True, ids=str)
def test_losses(pair):
    """To 1e-5, and their gradients, all together, to 1e-5, or to twice eager's own error against fp64."""
    theirs, ours, head = pair
    # Of answers, transformers lets pads into the softmax over positions.
    inputs = given(theirs, head, "ones" if head == "ForQuestionAnswering" else "right")
    labels = labels_for(theirs, head, inputs)
    exact = copy.deepcopy(theirs).double()
    losses = [model(**inputs, **labels).loss for model in (ours, theirs, exact)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert gradient_error(ours, theirs, exact, losses) <= 1


@pytest.mark.parametrize("pair", OWN, indirect=True, ids=str)
def test_folders_are_theirs(pair, tmp_path):
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours")
    state = theirs.state_dict()
    assert state.keys() == again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in again.state_dict().items())
    theirs.config._name_or_path = again.config._name_or_path
    assert again.config.to_dict() == theirs.config.to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_input(name, tmp_path):
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    ours = fastbert.AutoModel.from_pretrained(tmp_path)
    inputs = given(theirs, "Model", "right")
    mask = inputs["attention_mask"]
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    packed = ours(inputs["input_ids"][mask == 1], cu_seqlens=cu_seqlens, max_seqlen=8).last_hidden_state
    assert torch.equal(packed, ours(**inputs).last_hidden_state[mask == 1])


def test_a_class_of_bert_refuses_another_family(tmp_path):
    make("roberta").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'roberta'; BertModel reads 'bert'"):
        fastbert.BertModel.from_pretrained(tmp_path)


def test_an_unknown_family_is_named_with_those_that_are_known(tmp_path):
    transformers.AlbertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'albert'; fastbert reads 'bert', 'roberta'"):
        fastbert.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_hooks_on_the_modules_of_a_masked_lm_head_fire(name, tmp_path):
    """With the states and the result that transformers' modules have."""
    theirs = make(name, "ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    ours, ids, seen = fastbert.AutoModelForMaskedLM.from_pretrained(tmp_path), torch.tensor([[5, 6, 7]]), {}
    names = ours.family.masked_lm
    paths = {*names.containers, names.dense, names.norm, names.decoder} - {"cls", None}
    for which, model in (("ours", ours), ("theirs", theirs)):
        for path in paths:
            hook = lambda module, args, out, key=(which, path): seen.update({key: (args[0], out)})  # noqa: E731
            model.get_submodule(path).register_forward_hook(hook)
        with torch.no_grad():
            model(ids)
    assert {path for which, path in seen if which == "ours"} == paths
    for path in paths:
        for a, b in zip(seen["ours", path], seen["theirs", path], strict=True):
            if path != names.dense:  # its activation is fused here
                close(a.flatten(), b.flatten())


@pytest.mark.parametrize("name", CONFIGS)
def test_hooks_on_the_modules_of_a_classifier_fire(name, tmp_path):
    make(name, "ForSequenceClassification").save_pretrained(tmp_path)
    ours, seen = fastbert.AutoModelForSequenceClassification.from_pretrained(tmp_path), []
    ours.classifier.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        logits = ours(torch.tensor([[5, 6, 7]])).logits
    assert len(seen) == 1 and (torch.equal(seen[0], logits) or name == "eurobert")  # the mean of the tokens' logits


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification", "QuestionAnswering", "MultipleChoice"])
@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_is_where_transformers_has_it(name, head):
    """By the number and the rates of the modules that drop, in training."""
    if not hasattr(transformers, f"{CONFIGS[name][0]}For{head}"):
        with pytest.raises(ValueError, match=f"transformers has no {CONFIGS[name][0]}For{head}"):
            config = fastbert.BertConfig.from_dict({"model_type": name.partition(" ")[0]})
            with torch.device("meta"):
                OURS[f"For{head}"].of(config)(config)
        return
    sizes = {"attention_dropout": 0.3, "dropout": 0.4} if name == "distilbert" else {}
    if "modernbert" in name:
        sizes = {"embedding_dropout": 0.1, "mlp_dropout": 0.2, "attention_dropout": 0.3, "classifier_dropout": 0.4}
    theirs = make(name, f"For{head}", **sizes)
    ours = OURS[f"For{head}"].of(fastbert.BertConfig.from_dict(theirs.config.to_dict()))
    ours = ours(fastbert.BertConfig.from_dict(theirs.config.to_dict()))
    rates = [
        sorted(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p) for model in (ours, theirs)
    ]
    assert rates[0] == rates[1]
