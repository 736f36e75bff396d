"""MultiHead: the answers of each head alone, in one pass of the encoder."""

import copy

import pytest
import torch
from tasks_support import KINDS, labels, make_texts, same, save, save_head

import fastbert

TEXTS = make_texts(40)


@pytest.fixture(scope="module", params=KINDS)
def folders(request, tmp_path_factory):
    """A base, and four heads on it: two of texts, one of several labels, one of tokens."""
    kind, home = request.param, tmp_path_factory.mktemp(request.param)
    base = fastbert.AutoModel.from_pretrained(save(home / "base", kind, "Model")).state_dict()
    kinds = {
        "topic": ("ForSequenceClassification", labels("sport", "news", "art")),
        "mood": ("ForSequenceClassification", labels("good", "bad")),
        "several": ("ForSequenceClassification", {**labels("a", "b"), "problem_type": "multi_label_classification"}),
        "names": ("ForTokenClassification", labels("O", "B-PER", "I-PER")),
    }
    for seed, (name, (head, settings)) in enumerate(kinds.items()):
        save_head(home / name, kind, head, base, seed, **settings)
    return home, list(kinds)


def test_as_each_alone(folders, monkeypatch):
    home, names = folders
    several = fastbert.MultiHead(home / "base", {name: home / name for name in names}, max_tokens=500)
    alone = {name: fastbert.pipeline(None, home / name) for name in names}
    settings = {"topic": {"top_k": 2}, "names": {"aggregation_strategy": "simple"}}
    found = several(TEXTS, **settings)
    for name in names:
        same([answers[name] for answers in found], alone[name](TEXTS, **settings.get(name, {})))
    same(several(TEXTS[-1])["mood"], alone["mood"]([TEXTS[-1]])[0])
    same(list(several(iter(TEXTS)))[3]["mood"], found[3]["mood"])


def test_the_encoder_runs_once_and_is_held_once(folders, monkeypatch):
    from fastbert.tasks import multi_head

    home, names = folders
    several = fastbert.MultiHead(home / "base", {name: home / name for name in names})
    calls = []
    run = multi_head.run_bert
    monkeypatch.setattr(multi_head, "run_bert", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    several(TEXTS[:5])
    assert len(calls) == 1
    words = several.base.get_input_embeddings().weight
    assert all(head.model.get_input_embeddings().weight is words for head in several.heads.values())


def test_bad_input(folders, tmp_path):
    home, _names = folders
    other = fastbert.pipeline(None, home / "mood").model
    changed = copy.deepcopy(other)
    with torch.no_grad():
        next(iter(changed.base_model.parameters()))[0] += 1
    with pytest.raises(ValueError, match=r"heads\['mood'\] has another .* than the base"):
        fastbert.MultiHead(home / "base", {"mood": changed})
    with pytest.raises(ValueError, match="heads is empty"):
        fastbert.MultiHead(home / "base", {})
    with pytest.raises(TypeError, match="there is no head 'color'; there are 'mood'"):
        fastbert.MultiHead(home / "base", {"mood": other})("a", color={})
    with pytest.raises(ValueError, match="tokenizer is missing"):
        fastbert.MultiHead(fastbert.AutoModel.from_pretrained(home / "base"), {"mood": other})
