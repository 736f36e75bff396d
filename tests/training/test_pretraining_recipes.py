"""What recipes choose: masks that change, spans, growing sequences and batches, sources, averages, RTD."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from training_support import MadeUpBatches, assert_same_weights, make_run, make_settings, resumed_run, weights
from training_text import VOCAB, keys, prepared, rows, sequences, within

import fastbert
from fastbert.model.heads import ModelForMaskedLM
from fastbert.training.average import FOLDER, WeightAverage
from fastbert.training.batches import PackedBatches
from fastbert.training.masking import IGNORED, Masker, Masking, span_shares, start_probability
from fastbert.training.mixture import Mixture
from fastbert.training.muon import Muon
from fastbert.training.objective import MicroBatch
from fastbert.training.optimizer import make_optimizer
from fastbert.training.prepare import PrepareSettings
from fastbert.training.replaced_tokens import ReplacedTokens, generator_config
from fastbert.training.schedule import make_schedule, ramp
from fastbert.training.settings import OptimizerSettings, SettingsError
from fastbert.training.shards import Shards
from fastbert.training.stable_adamw import StableAdamW

TOKENIZER = fastbert.BertTokenizer(VOCAB)


@pytest.mark.parametrize("decay", ["linear", "1-sqrt"])
def test_a_trapezoid_is_that_of_transformers(decay):
    from transformers import get_wsd_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = get_wsd_schedule(
        optimizer, num_warmup_steps=5, num_decay_steps=10, num_training_steps=50, decay_type=decay, min_lr_ratio=0.0
    )
    ours = make_schedule("wsd", 0.5, warmup_steps=5, total_steps=50, decay=decay, decay_share=0.2)
    for step in range(51):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_a_ramp_ends_where_it_should():
    assert [ramp(step, 10, 20, 4) for step in (0, 1, 3, 4, 9)] == [10, 12.5, 17.5, 20, 20]


@pytest.mark.parametrize("mean", [2.0, 3.8, 6.0])
@pytest.mark.parametrize("whole_words", [False, True])
def test_spans_have_their_mean_and_the_masks_their_share(mean, whole_words):
    """Away from a sequence's ends; runs of labels are longer where two spans touch."""
    count = 2000
    tokens, offsets = sequences(count, 200)
    tokens[tokens == VOCAB.index("[UNK]")] = VOCAB.index("ba")  # where a span would end
    masking = Masking(probability=0.15, span_length=mean, whole_words=whole_words)
    _, labels = Masker(TOKENIZER, masking)(tokens, offsets, keys(count))
    chosen = (labels != IGNORED).reshape(count, 200)
    assert not chosen[:, [0, 66, -1]].any()  # [CLS] and [SEP]
    if not whole_words:
        inner = chosen[:, 80:190]
        assert abs(inner.mean() - 0.15) < 0.01, inner.mean()
    assert chosen.any(axis=1).all()
    runs = lambda mask: mask.sum() / np.diff(mask.astype(int), axis=1).clip(0).sum()  # noqa: E731
    _, labels = Masker(TOKENIZER, Masking(whole_words=whole_words))(tokens, offsets, keys(count))
    assert runs(chosen) > 0.6 * mean * runs((labels != IGNORED).reshape(count, 200))


def test_the_lengths_of_spans_are_geometric():
    shares = span_shares(3.8)
    assert shares[0] == 1 and shares.sum() == pytest.approx(3.8) and np.allclose(shares[1:] / shares[:-1], shares[1])
    assert span_shares(1.0)[1] < 1e-6
    start = start_probability(0.15, shares)
    assert 1 - np.prod(1 - start * shares) == pytest.approx(0.15)


def test_a_span_depends_on_its_own_sequence_alone():
    tokens, offsets = sequences(8, 50)
    mask, of = Masker(TOKENIZER, Masking(span_length=4.0)), keys(8)
    whole, labels = mask(tokens, offsets, of)
    for i in range(8):
        seen, own = mask(tokens[offsets[i] : offsets[i + 1]], np.array([0, 50]), of[i : i + 1])
        np.testing.assert_array_equal(seen, whole[offsets[i] : offsets[i + 1]])
        np.testing.assert_array_equal(own, labels[offsets[i] : offsets[i + 1]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    settings = PrepareSettings(max_length=40, pairs=False)
    return [prepared(tmp_path_factory.mktemp(name), settings) for name in ("a", "b")]


def test_shorter_sequences_lose_no_token(folders):
    shards = Shards(folders[0])
    whole, cut = (PackedBatches(shards, tokens_per_batch=500, seed=3) for _ in range(2))
    cut.limit(length=16)
    for _ in range(6):
        a, b = next(whole), next(cut)
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
        assert b.max_seqlen <= 16 < a.max_seqlen
        assert set(a.cu_seqlens.tolist()) < set(b.cu_seqlens.tolist())
        assert b.cu_seqlens.diff().min() > 0
    cut.limit(length=None)
    assert rows(next(cut)) == rows(next(whole))


def test_pairs_are_not_cut(tmp_path):
    batches = PackedBatches(Shards(prepared(tmp_path, PrepareSettings(max_length=40))), tokens_per_batch=500, seed=3)
    with pytest.raises(ValueError, match="holds pairs of segments, which cannot be cut to 16 tokens"):
        batches.limit(length=16)


def test_limits_of_tokens_and_masks(folders):
    batches = PackedBatches(Shards(folders[0]), tokens_per_batch=2000, seed=3)
    batches.limit(tokens=200)
    sizes = [len(next(batches).input_ids) for _ in range(4)]
    assert max(sizes) <= 200 and min(sizes) > 120
    batches.limit(tokens=2000, probability=0.4)
    labels = torch.cat([next(batches).labels for _ in range(10)])
    within((labels != IGNORED).float().mean().item(), 0.4 * 0.93, len(labels), sigmas=12)  # special ones never are
    with pytest.raises(ValueError, match="tokens_per_batch is 10"):
        batches.limit(tokens=10)


def test_sources_give_their_shares_and_go_on(folders):
    def make():
        sources = [PackedBatches(Shards(folder), tokens_per_batch=400, seed=3 + i) for i, folder in enumerate(folders)]
        return Mixture(sources, 400, (3.0, 1.0))

    whole = make()
    sizes = np.zeros(2)
    for _ in range(40):
        before = [source.state_dict() for source in whole.sources]
        batch = next(whole)
        assert 240 < len(batch.input_ids) <= 400 and batch.cu_seqlens[-1] == len(batch.input_ids)
        assert batch.max_seqlen == batch.cu_seqlens.diff().max()
        taken = [s.taken if s.state_dict() != b else 0 for s, b in zip(whole.sources, before, strict=True)]
        assert sum(taken) == len(batch.input_ids)
        sizes += taken
    assert sizes[0] / sizes.sum() == pytest.approx(0.75, abs=0.01)
    state = json.loads(json.dumps(whole.state_dict()))
    again = make()
    again.load_state_dict(state)
    assert [rows(next(again)) for _ in range(5)] == [rows(next(whole)) for _ in range(5)]
    whole.limit(weights=(0.0, 1.0))
    before = whole.sources[0].state_dict()
    for _ in range(3):
        next(whole)
    assert whole.sources[0].state_dict() == before
    with pytest.raises(ValueError, match="there were 2 folders"):
        Mixture(whole.sources[:1], 400, (1.0,)).load_state_dict(state)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.9, 0.06, 0.04)])
def test_small_shares_wait_and_no_batch_is_too_large(folders, weights):
    """Of a batch of three examples, sources of a third of it and of less."""
    shards = [Shards(folder) for folder in (*folders, folders[0])]
    mixture = Mixture([PackedBatches(s, tokens_per_batch=120, seed=i) for i, s in enumerate(shards)], 120, weights)
    sizes = np.zeros(3)
    for _ in range(300):
        before = [source.state_dict() for source in mixture.sources]
        batch = next(mixture)
        sizes += [s.taken if s.state_dict() != b else 0 for s, b in zip(mixture.sources, before, strict=True)]
        assert 0 < len(batch.input_ids) <= 120
    assert sizes / sizes.sum() == pytest.approx(np.array(weights) / sum(weights), abs=0.01)


def naive_stable_adamw(w, g, state, lr, beta1, beta2, eps, decay):
    """Algorithm 2 of Wortsman et al., 2023, with Adam's bias correction."""
    state["t"] += 1
    state["m"] = beta1 * state["m"] + (1 - beta1) * g
    state["v"] = beta2 * state["v"] + (1 - beta2) * g * g
    m, v = state["m"] / (1 - beta1 ** state["t"]), state["v"] / (1 - beta2 ** state["t"])
    rms = ((g / (v.sqrt() + eps)) ** 2).mean().sqrt()
    return w - lr / max(1.0, rms.item()) * (m / (v.sqrt() + eps) + decay * w)


def test_stable_adamw_against_a_loop_over_tensors():
    torch.manual_seed(0)
    weights_ = [torch.nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (3, 40, 200)]
    optimizer = StableAdamW(weights_, lr=0.1, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.02)
    expected = [w.detach().clone() for w in weights_]
    states = [{"t": 0, "m": torch.zeros_like(w), "v": torch.zeros_like(w)} for w in expected]
    for step in range(6):
        for i, w in enumerate(weights_):
            w.grad = torch.randn_like(w) * (30.0 if step == 4 else 1.0)  # a sudden rise
            expected[i] = naive_stable_adamw(expected[i], w.grad, states[i], 0.1, 0.9, 0.95, 1e-6, 0.02)
        optimizer.step()
        for w, wanted in zip(weights_, expected, strict=True):
            torch.testing.assert_close(w.detach(), wanted)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_muon_is_that_of_torch(shape):
    """Whose iteration is in bf16: updates agree to its rounding."""
    torch.manual_seed(0)
    mine, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.1}
    optimizers = Muon([mine], **options), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(5):
        mine.grad = torch.randn(shape)
        theirs.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (mine - theirs).norm() < 0.03 * (mine - 1).norm()


def test_muon_takes_the_matrices_of_the_layers():
    model = fastbert.BertForMaskedLM(
        fastbert.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
    )
    optimizer = make_optimizer(model, OptimizerSettings(name="muon", lr=0.01))
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    assert muon == {n for n, p in model.named_parameters() if ".layer." in n and p.dim() == 2}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        step = p.detach() - before[name] * (1 - 0.01 * 0.01 * (name in muon))
        rms = step.square().mean().sqrt().item()
        assert not torch.equal(p, before[name]), name
        if name in muon:  # the size of AdamW's updates
            assert rms == pytest.approx(0.01 * 0.2, rel=0.35), (name, rms)


def test_an_average_follows_the_weights(tmp_path):
    model = fastbert.BertForMaskedLM(
        fastbert.BertConfig(
            vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    average, parameter = WeightAverage({"": model}, 0.9), next(model.parameters())
    expected = parameter.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            parameter.add_(1.0)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    now = parameter.detach().clone()
    with average.in_place():
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter.detach(), now)
    average.save(tmp_path)
    other = WeightAverage({"": model}, 0.9)
    other.load(tmp_path)
    for a, b in zip(other._averages, average._averages, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer__name": "stable_adamw"},
        {"optimizer__name": "muon"},
        {"training__ema": 0.9},
        {"schedule__shape": "wsd", "schedule__decay_share": 0.5},
    ],
    ids=str,
)
def test_resumed_is_uninterrupted(tmp_path, options):
    whole = make_run(make_settings(tmp_path / "whole", **options)).run()
    settings = make_settings(tmp_path / "broken", **options)
    run = resumed_run(settings)
    train = run._train

    def failing(*args):
        if run.step == 3:
            raise KeyError
        train(*args)

    run._train = failing
    with pytest.raises(KeyError):
        run.run()
    outcome = resumed_run(settings).run()
    assert_same_weights(whole.checkpoint, outcome.checkpoint)
    if "training__ema" in options:
        assert_same_weights(whole.checkpoint / FOLDER, outcome.checkpoint / FOLDER)
        assert weights(whole.checkpoint).keys() == weights(whole.checkpoint / FOLDER).keys()


def test_the_average_is_what_is_evaluated(tmp_path):
    run = make_run(make_settings(tmp_path, training__ema=0.99, optimizer__lr=0.01))
    run.run()
    averaged, _ = run.evaluate_heldout()
    average, run.average = run.average, None
    plain, _ = run.evaluate_heldout()
    with average.in_place():
        assert run.evaluate_heldout()[0] == averaged != plain


def electra():
    torch.manual_seed(0)
    sizes = {"vocab_size": len(VOCAB), "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    return fastbert.BertConfig.from_dict({"model_type": "electra", **sizes})


def test_replaced_tokens_against_the_definition(tmp_path):
    config = electra()
    model = fastbert.ElectraForPreTraining(config)
    small = generator_config(config, 0.5)
    assert (small.hidden_size, small.num_attention_heads, small.intermediate_size) == (16, 2, 32)
    generator = ModelForMaskedLM(small)
    objective = ReplacedTokens(model, generator, 50.0).eval()
    assert generator.electra.embeddings is model.electra.embeddings
    assert generator.get_output_embeddings().weight is model.electra.embeddings.word_embeddings.weight
    batch = MadeUpBatches(pairs=False).batch(1)
    batch.input_ids.clamp_(max=len(VOCAB) - 1), batch.labels.clamp_(max=len(VOCAB) - 1)
    micro = MicroBatch.of(batch, config, "rtd", "cpu")
    torch.manual_seed(5)
    words, found = objective(micro, micro.counts)
    torch.manual_seed(5)
    filled = objective._filled(generator.electra(batch.input_ids, token_type_ids=batch.token_type_ids,
        cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen).last_hidden_state[micro.labelled], micro)  # fmt: skip
    asked = batch.labels != IGNORED
    assert torch.equal(filled[~asked], batch.input_ids[~asked])
    output = generator(batch.input_ids, token_type_ids=batch.token_type_ids, cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen, labels=batch.labels)  # fmt: skip
    torch.testing.assert_close(words, output.loss, rtol=1e-5, atol=1e-6)
    wrong = (asked & (filled != batch.labels)).float()
    assert 0 < wrong.sum() <= asked.sum()
    logits = model(
        filled, token_type_ids=batch.token_type_ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen
    )
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits.logits, wrong)
    torch.testing.assert_close(found, 50 * expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(objective.scores(micro), objective.scores(micro))  # what is drawn is the same
    assert objective.models == {"": model, "generator": generator}
    cheap = ReplacedTokens(model, generator, 1.0).eval()  # an evaluation has the same weight as training
    assert objective.scores(micro)[2] == pytest.approx(50 * cheap.scores(micro)[2].item())


CONFIG = """
[data]
shards = "{shards}"
more_shards = ["{other}"]
weights = [3, 1]
anneal_weights = [0, 1]
anneal_share = 0.25
tokens_per_batch = 400
batch_start = 100
batch_warmup_steps = 4
length_start = 16
length_warmup_steps = 4
mask_probability = 0.3
mask_probability_end = 0.15
span_length = 2.0
heldout_batches = 2
[model]
config = "{config}"
[optimizer]
lr = 1e-3
[schedule]
shape = "wsd"
[training]
steps = 8
objective = "{objective}"
ema = 0.9
log_every = 1
save_every = 2
evaluate_every = 4
keep = 9
[output]
folder = "{out}"
tensorboard = false
"""


@pytest.mark.parametrize("objective", ["mlm", "rtd"])
def test_the_command_with_all_of_it_and_a_kill(tmp_path, objective):
    """Stopped after four steps, it goes on to the same weights, generator and average."""
    from fastbert.cli.main import main

    settings = PrepareSettings(max_length=40, pairs=False, held_out=0.2)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    shards, other = (prepared(tmp_path / name, settings) for name in ("a", "b"))
    electra().save_pretrained(tmp_path / "config")

    def config(name):
        given = {"shards": shards, "other": other, "config": tmp_path / "config", "out": tmp_path / name}
        file = tmp_path / f"{name}.toml"
        file.write_text(CONFIG.format(objective=objective, **given))
        return str(file)

    assert main(["pretrain", config("whole"), "--device", "cpu"]) == 0
    assert main(["pretrain", config("part"), "--device", "cpu"]) == 0
    for step in (6, 8):
        import shutil

        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"step-{step:08d}")
    assert main(["pretrain", config("part"), "--device", "cpu", "--resume"]) == 0
    last = "checkpoints/step-00000008"
    folders = ["", FOLDER, *(["generator", f"{FOLDER}/generator"] if objective == "rtd" else [])]
    for folder in folders:
        assert_same_weights(tmp_path / "whole" / last / folder, tmp_path / "part" / last / folder)
    if objective == "rtd":
        own, average = (weights(tmp_path / "whole" / last / name) for name in ("generator", f"{FOLDER}/generator"))
        assert all(not torch.equal(own[name], average[name]) for name in own if name.endswith("dense.weight"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    heldout = [line for line in lines if line["kind"] == "heldout"]
    wanted = {"mlm_loss", "mlm_accuracy"} | ({"rtd_loss", "rtd_accuracy"} if objective == "rtd" else set())
    assert all(wanted <= line.keys() and math.isfinite(line["loss"]) for line in heldout)
    kind = fastbert.ElectraForPreTraining if objective == "rtd" else ModelForMaskedLM
    kind.from_pretrained(tmp_path / "whole" / last)


def test_the_first_batch_holds_an_example_of_each_process(folders, tmp_path, capsys):
    from fastbert.cli.main import main

    electra().save_pretrained(tmp_path / "config")
    given = {"shards": folders[0], "other": folders[1], "config": tmp_path / "config", "out": tmp_path / "out"}
    text = CONFIG.format(objective="mlm", **given).replace("batch_start = 100", "batch_start = 30")
    (tmp_path / "run.toml").write_text(text)
    assert main(["pretrain", str(tmp_path / "run.toml"), "--device", "cpu"]) == 1
    told = "data.batch_start is 30; 1 process with examples of up to 40 tokens take at least 40"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "values, message",
    [
        ({"data__weights": [1.0, 2.0]}, "data.weights is given, and data.more_shards is not"),
        ({"data__more_shards": ["b"], "data__weights": [1.0]}, r"data.weights is \[1.0\]; it must be 2 numbers"),
        ({"data__batch_start": 100}, "data.batch_start and data.batch_warmup_steps belong together"),
        ({"data__length_warmup_steps": 10}, "data.length_start and data.length_warmup_steps belong together"),
        ({"data__batch_start": 99999, "data__batch_warmup_steps": 2}, "it must be at most tokens_per_batch, 16384"),
        (
            {"training__ema": 0.9, "training__sharding": "full"},
            "training.ema is given, and training.sharding is 'full'",
        ),
        ({"data__span_length": 11.0}, "data.span_length is 11.0; it must be at least 1 and at most 10"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, values, message):
    with pytest.raises(SettingsError, match=message):
        make_settings(tmp_path, **values)
