"""Real weights against transformers (or, for the Chinese model, its own TorchScript)."""

import csv

import numpy as np
import pytest
import torch
import transformers
from support import tokens

import fastbert

pytestmark = pytest.mark.usefixtures("all_cores")
SENTENCES = [
    "A man is playing a guitar.",
    "Someone plays an instrument on the street while a small crowd listens and claps.",
    "The stock market fell sharply on Monday.",
    "Ok",
]


def encode(folder, **options):
    return fastbert.BertTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt", **options)


def assert_heads_equal(folder, heads, inputs, tolerance=1e-5):
    """Outputs at real tokens, losses and all gradients, of each head on these weights."""
    mask = inputs["attention_mask"].bool()
    rows = len(mask)
    words = inputs["input_ids"].masked_fill(~mask, -100)
    labels = {
        "BertModel": {},
        "BertForPreTraining": {"labels": words, "next_sentence_label": torch.ones(rows, dtype=torch.long)},
        "BertForMaskedLM": {"labels": words},
        "BertForNextSentencePrediction": {"labels": torch.ones(rows, dtype=torch.long)},
        "BertForSequenceClassification": {"labels": torch.ones(rows, dtype=torch.long)},
        "BertForTokenClassification": {"labels": (words % 2).masked_fill(~mask, -100)},
        "BertForQuestionAnswering": {},
    }
    for name in heads:
        torch.manual_seed(0)
        theirs = getattr(transformers, name).from_pretrained(folder).eval()
        with pytest.MonkeyPatch.context() as patch:  # to draw numbers takes longer than all else: none is kept
            for draw in ("normal_", "uniform_"):
                patch.setattr(torch.Tensor, draw, lambda tensor, *args, **kwargs: tensor.fill_(torch.nan))
            mine = getattr(fastbert, name)(fastbert.BertConfig.from_pretrained(folder)).eval()
        mine.load_state_dict({n: t for n, t in theirs.state_dict().items() if "position_ids" not in n}, strict=False)
        a, b = (model(**inputs, **labels[name]) for model in (mine, theirs))
        losses = []
        for out in (a, b):
            loss = out.get("loss")
            for field in ("last_hidden_state", "start_logits", "end_logits"):
                if field in out:
                    loss = out[field][mask].pow(2).mean() + (0 if loss is None else loss)
            if "pooler_output" in out:
                loss = loss + out["pooler_output"].pow(2).mean()
            losses.append(loss)
        torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
        for field in (f for f in b if f != "loss"):
            x, y = a[field], b[field]
            x, y = (x[mask], y[mask]) if x.shape[:2] == mask.shape else (x, y)
            scale = max(1.0, y.abs().max().item())
            assert (x - y).abs().max() <= tolerance * scale, (name, field, (x - y).abs().max(), scale)
        for loss in losses:
            loss.backward()
        expected = dict(theirs.named_parameters())
        for parameter, p in mine.named_parameters():
            q = expected[parameter]
            assert (p.grad is None) == (q.grad is None), (name, parameter)
            if p.grad is not None:
                # A key's bias moves all scores of a query alike: its gradient is 0, and rounding of the weight's.
                size = expected[parameter.replace("key.bias", "key.weight")].grad.norm()
                error = (p.grad - q.grad).norm() / size
                assert error <= tolerance, (name, parameter, error)


HEADS = [
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]


def test_minilm_every_head(minilm):
    assert_heads_equal(minilm, HEADS, encode(minilm))


def test_minilm_a_text_alone_and_in_a_batch(minilm):
    model = fastbert.BertModel.from_pretrained(minilm)
    batch = encode(minilm)
    with torch.inference_mode():
        together = model(**batch)
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            alone = model(batch["input_ids"][row : row + 1, :length])
            mine, vector = together[0][row, :length], alone[0][0]
            torch.testing.assert_close(
                torch.nn.functional.normalize(mine.mean(0), dim=0),
                torch.nn.functional.normalize(vector.mean(0), dim=0),
                rtol=0,
                atol=1e-6,
            )
            assert (mine - vector).abs().max() <= 1e-6 * max(1.0, vector.abs().max().item())
            assert (together[1][row] - alone[1][0]).abs().max() <= 1e-6


def test_minilm_left_padded(minilm):
    """As transformers, but for the pooler, which takes a row's first real token."""
    batch = encode(minilm)
    flipped = {
        k: torch.stack([row.roll(int((m == 0).sum())) for row, m in zip(v, batch["attention_mask"], strict=True)])
        for k, v in batch.items()
    }
    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    mine = fastbert.BertModel.from_pretrained(minilm)
    with torch.inference_mode():
        a, b = mine(**flipped), theirs(**flipped)
    real = flipped["attention_mask"].bool()
    assert (flipped["attention_mask"][:, 0] == 0).any()
    torch.testing.assert_close(a[0][real], b[0][real], rtol=1e-5, atol=1e-5)
    first = a[0][torch.arange(len(real)), real.int().argmax(1)]
    torch.testing.assert_close(a[1], theirs.pooler.activation(theirs.pooler.dense(first)), rtol=1e-5, atol=1e-5)
    whole = real[:, 0]
    torch.testing.assert_close(a[1][whole], b[1][whole], rtol=1e-5, atol=1e-5)


def test_minilm_inside_a_sentence_transformer(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    expected = model.encode(SENTENCES)
    fastbert.accelerate(model)
    np.testing.assert_allclose(model.encode(SENTENCES), expected, rtol=0, atol=1e-5)
    assert "packed, by fastbert" in str(fastbert.explain(model)) and "calls ran" not in str(fastbert.explain(model))
    fastbert.restore(model)
    assert np.array_equal(model.encode(SENTENCES), expected)


def spearman(a, b):
    from scipy.stats import spearmanr

    return 100 * spearmanr(a, b).statistic


def test_minilm_stsb_test_spearman(minilm, stsb):
    from fastbert.inference import Embedder

    with open(next(stsb.rglob("sts-test.csv")), encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 1379
    embedder = Embedder.from_pretrained(minilm)
    left, right = (embedder.embed([row[i] for row in rows]) for i in (5, 6))
    assert spearman((left * right).sum(1), [float(row[4]) for row in rows]) == pytest.approx(82.03, abs=0.01)


@pytest.mark.slow
def test_antiberty_every_head_and_its_predictions(antiberty):
    import warnings

    residues = (
        "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK",
        "DIQMTQSPSSLSASVGDRVTITCRASQSISSYLNWYQQKPGKAPKLLIYAASSLQSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQSYSTPLT",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no head may be new
        model = fastbert.BertForMaskedLM.from_pretrained(antiberty)
    vocab = (antiberty / "vocab.txt").read_text().split()
    known = {token: i for i, token in enumerate(vocab)}
    right = total = 0
    for sequence in residues:
        ids = torch.tensor([[known["[CLS]"], *(known[r] for r in sequence), known["[SEP]"]]])
        places = torch.arange(1, len(sequence) + 1, 3)  # one row masks one of them
        rows = torch.arange(len(places))
        masked = ids.repeat(len(places), 1)
        masked[rows, places] = known["[MASK]"]
        with torch.inference_mode():
            logits = model(masked).logits
        right += (logits[rows, places].argmax(-1) == ids[0, places]).sum().item()
        total += len(places)
    assert right / total > 0.9
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 5:] = 0
    inputs = {"input_ids": tokens(3, 12, 25), "attention_mask": mask}
    assert_heads_equal(antiberty, HEADS, inputs)


def test_chinese_bert_equals_its_torchscript(chinese_bert):
    """An oracle that is not transformers: the traced model, and ours on the same weights."""
    script = torch.jit.load(chinese_bert / "model.pt", map_location="cpu").eval()
    state = script.model.state_dict()
    config = fastbert.BertConfig(
        vocab_size=21128, hidden_size=512, num_hidden_layers=2, num_attention_heads=8, intermediate_size=2048
    )
    model = fastbert.BertModel(config).eval()
    assert not model.load_state_dict(state, strict=False).missing_keys
    texts = ["今天天气很好。", "我喜欢吃苹果和香蕉，也喜欢喝茶。"]
    batch = fastbert.BertTokenizer.from_pretrained(chinese_bert)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        mine = model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        theirs = script.model(batch["input_ids"], batch["attention_mask"])[0]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(mine[real], theirs[real], rtol=1e-5, atol=1e-5)


def test_random_bert_base_every_head(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(num_hidden_layers=3))
    theirs.save_pretrained(tmp_path)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 10:] = 0
    assert_heads_equal(
        tmp_path,
        ["BertModel", "BertForMaskedLM"],
        {"input_ids": tokens(2, 24, 30522), "attention_mask": mask},
    )
