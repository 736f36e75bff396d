"""Pre-training on real text against transformers': the same curve without dropout, no worse an end with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastbert
from fastbert.training.batches import PackedBatches, PretrainingBatch
from fastbert.training.objective import MicroBatch, Objective
from fastbert.training.optimizer import clip_gradients, make_optimizer
from fastbert.training.prepare import PrepareSettings, prepare
from fastbert.training.schedule import make_schedule
from fastbert.training.settings import OptimizerSettings
from fastbert.training.shards import Shards

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_cores")]

STEPS, TOKENS, SEEDS = 200, 1024, (0, 1, 2)
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    from assets import AssetUnavailable, wiki_leads

    try:
        documents = wiki_leads()
    except AssetUnavailable as reason:
        pytest.skip(f"wiki-leads cannot be had: {reason}")
    folder = tmp_path_factory.mktemp("parity")
    text = folder / "wiki.txt"
    text.write_text("\n\n".join(documents))
    prepare([text], folder / "out", PrepareSettings(max_length=128, held_out=0.02), learn_vocab=4096, processes=2)
    return folder / "out"


def padded(batch: PretrainingBatch) -> dict[str, torch.Tensor]:
    """transformers' arguments of a packed batch."""
    lengths = batch.cu_seqlens.diff().tolist()

    def pad(values: torch.Tensor, filler: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True, padding_value=filler)

    return {
        "input_ids": pad(batch.input_ids, 0),
        "token_type_ids": pad(batch.token_type_ids, 0),
        "attention_mask": pad(torch.ones_like(batch.input_ids), 0),
        "labels": pad(batch.labels, -100),
        "next_sentence_label": batch.next_sentence_label,
    }


def fresh_model(dropout: float) -> fastbert.BertForPreTraining:
    torch.manual_seed(0)
    config = fastbert.BertConfig(vocab_size=4096, **SIZES)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    return fastbert.BertForPreTraining(config).train()


def ours(dropout: float):
    model = fresh_model(dropout)
    objective = Objective(model)

    def loss_of(batch):
        micro_batch = MicroBatch.of(batch, model.config, "mlm_nsp", "cpu")
        return objective(micro_batch, micro_batch.counts).sum()

    return model, loss_of


def theirs(dropout: float):
    import transformers

    mine = fresh_model(dropout)
    twin = transformers.BertForPreTraining(transformers.BertConfig(**mine.config.to_dict()))
    twin.load_state_dict(mine.state_dict())
    return twin.train(), lambda batch: twin(**padded(batch)).loss


def train(trained, shards: Path, seed: int) -> tuple[list[float], float]:
    """The losses of all steps, and the held-out loss at the end; `seed` is that of dropout."""
    model, loss_of = trained
    torch.manual_seed(seed)
    optimizer = make_optimizer(model, OptimizerSettings(lr=5e-4))
    rate = make_schedule("linear", 5e-4, warmup_steps=20, total_steps=STEPS)
    batches, losses = iter(PackedBatches(Shards(shards), tokens_per_batch=TOKENS, seed=7)), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = loss_of(next(batches))
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    model.eval()
    held_out = list(PackedBatches(Shards(shards, split="held_out"), tokens_per_batch=4096, seed=7, epochs=1))
    with torch.no_grad():
        weights = [len(b.input_ids) for b in held_out]
        total = sum(w * loss_of(b).item() for w, b in zip(weights, held_out, strict=True))
    return losses, total / sum(weights)


def test_two_hundred_steps_follow_transformers(shards):
    """Dropout 0, fp32: each step's loss within 1e-3, relative."""
    (got, end), (expected, their_end) = (train(make(0.0), shards, 0) for make in (ours, theirs))
    worst = max(abs(a / b - 1) for a, b in zip(got, expected, strict=True))
    print(f"\n{STEPS} steps, dropout 0: losses {expected[0]:.4f} to {expected[-1]:.4f}, at most {worst:.1e} apart")
    print(f"held out: {end:.5f}, transformers {their_end:.5f}")
    assert expected[-1] < 0.9 * expected[0]
    assert worst < 1e-3
    assert end == pytest.approx(their_end, rel=1e-3)


def test_with_dropout_it_ends_where_transformers_does(shards):
    """Dropout 0.1: the mean held-out loss of three seeds is no further from transformers' than its seeds spread."""
    got, expected = ([train(make(0.1), shards, seed)[1] for seed in SEEDS] for make in (ours, theirs))
    spread = max(expected) - min(expected)
    print(f"\nheld-out loss with dropout: {got}, transformers {expected}")
    assert abs(sum(got) - sum(expected)) / len(SEEDS) <= spread
    assert all(min(expected) - spread <= loss <= max(expected) + spread for loss in got)
