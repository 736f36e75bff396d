"""The losses: transformers' numbers and curve, weighted by what there is, and how much work they are."""

from __future__ import annotations

import pytest
import torch
from training_support import SIZES, MadeUpBatches, make_run, make_settings

import fastbert
from fastbert.training.objective import MODELS, Counts, MicroBatch, Objective, training_flops


def padded(batch):
    """transformers' arguments of a packed batch."""
    lengths = batch.cu_seqlens.diff().tolist()
    pad = lambda values, filler: torch.nn.utils.rnn.pad_sequence(  # noqa: E731
        values.split(lengths), batch_first=True, padding_value=filler
    )
    return {
        "input_ids": pad(batch.input_ids, 0),
        "token_type_ids": pad(batch.token_type_ids, 0),
        "attention_mask": pad(torch.ones_like(batch.input_ids), 0),
        "labels": pad(batch.labels, -100),
    }


def theirs_of(model):
    import transformers

    config = transformers.BertConfig(**{name: value for name, value in model.config.to_dict().items()})
    twin = transformers.BertForPreTraining(config)
    twin.load_state_dict(model.state_dict())
    return twin.train()


def test_twenty_steps_follow_transformers(tmp_path):
    """Same weights, batches and AdamW: the losses of each step, and the weights at the end."""
    import transformers

    settings = make_settings(
        tmp_path, training__steps=20, training__log_every=1, training__accumulate=1, optimizer__lr=5e-3
    )
    run = make_run(settings, dropout=0.0, heldout=False)
    twin = theirs_of(run.model)
    no_decay = [p for n, p in twin.named_parameters() if "bias" in n or "LayerNorm" in n]
    decay = [p for n, p in twin.named_parameters() if not ("bias" in n or "LayerNorm" in n)]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}],
        lr=5e-3,
        betas=(0.9, 0.999),
        eps=1e-6,
    )
    rates = transformers.get_linear_schedule_with_warmup(optimizer, 2, 20)
    expected, batches = [], iter(MadeUpBatches())
    for _ in range(20):
        batch = next(batches)
        loss = twin(**padded(batch), next_sentence_label=batch.next_sentence_label).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        expected.append(loss.item())

    got, write = [], run._report
    run._report = lambda: (got.append(sum(run._figures()[0][:2])), write())
    run.run()
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=0)
    assert expected[-1] < 0.97 * expected[0]  # it learns, so that a curve is followed
    for (name, p), q in zip(run.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("objective", MODELS)
def test_the_parts_are_the_losses_of_the_models(objective):
    config = fastbert.BertConfig(**SIZES)
    model = MODELS[objective](config)
    batch = MadeUpBatches().batch(1)
    micro_batch = MicroBatch.of(batch, config, objective, "cpu")
    mlm, nsp = Objective(model)(micro_batch, micro_batch.counts).tolist()
    args = (batch.input_ids, None, batch.token_type_ids)
    packed = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
    if objective == "mlm_nsp":
        loss = model(*args, labels=batch.labels, next_sentence_label=batch.next_sentence_label, **packed).loss
        assert mlm + nsp == pytest.approx(loss.item(), rel=1e-6) and mlm > 1 and 0.3 < nsp < 2
    elif objective == "mlm":
        assert nsp == 0 and mlm == pytest.approx(model(*args, labels=batch.labels, **packed).loss.item(), rel=1e-6)
    else:
        loss = model(*args, labels=batch.next_sentence_label, **packed).loss
        assert mlm == 0 and nsp == pytest.approx(loss.item(), rel=1e-6)


def whole_gradient(batches, model):
    """The gradient of all batches as the loop adds it up."""
    micro_batches = [MicroBatch.of(b, model.config, "mlm_nsp", "cpu") for b in batches]
    whole = sum((m.counts for m in micro_batches), Counts())
    model.zero_grad()
    losses = torch.zeros(2)
    for micro_batch in micro_batches:
        parts = Objective(model)(micro_batch, whole)
        parts.sum().backward()
        losses += parts.detach()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def joined(batches):
    """The batches as one."""
    lengths = torch.cat([b.cu_seqlens.diff() for b in batches])
    columns = {
        name: torch.cat([getattr(b, name) for b in batches])
        for name in ("input_ids", "token_type_ids", "labels", "next_sentence_label")
    }
    return type(batches[0])(
        **columns,
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32),
        max_seqlen=int(lengths.max()),
    )


def test_accumulation_is_one_big_batch():
    """Unequal batches count by their tokens and sequences: no mean of means."""
    batches = [MadeUpBatches(sequences=n).batch(i) for i, n in enumerate((1, 6, 3))]
    model = fastbert.BertForPreTraining(fastbert.BertConfig(**SIZES)).double()
    losses, gradients = whole_gradient(batches, model)
    expected_losses, expected = whole_gradient([joined(batches)], model)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_batch_without_labels_gives_every_parameter_a_gradient():
    model = fastbert.BertForPreTraining(fastbert.BertConfig(**SIZES))
    batch = MadeUpBatches().batch(0)
    empty = type(batch)(**{**vars(batch), "labels": torch.full_like(batch.labels, -100)})
    losses, gradients = whole_gradient([empty], model)
    assert losses[0] == 0 and losses.isfinite().all()
    assert len(gradients) == len(list(model.parameters())) and all(g.isfinite().all() for g in gradients.values())


def test_scores_are_those_of_the_logits():
    config = fastbert.BertConfig(**SIZES)
    model = fastbert.BertForPreTraining(config).eval()
    batch = MadeUpBatches().batch(1)
    asked = batch.labels != -100
    with torch.no_grad():
        out = model(
            batch.input_ids,
            None,
            batch.token_type_ids,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
        )
        logits, labels = out.prediction_logits[asked], batch.labels[asked]
        # Half of the labels are what the model says, so that accuracies are neither 0 nor 1.
        labels[::2] = logits.argmax(1)[::2]
        batch.labels[asked] = labels
        batch.next_sentence_label[:] = out.seq_relationship_logits.argmax(1)
        batch.next_sentence_label[0] = 1 - batch.next_sentence_label[0]
        got = Objective(model).scores(MicroBatch.of(batch, config, "mlm_nsp", "cpu"))
    cross_entropy = torch.nn.functional.cross_entropy
    expected = [
        cross_entropy(logits, labels, reduction="sum"),
        (logits.argmax(1) == labels).sum(),
        cross_entropy(out.seq_relationship_logits, batch.next_sentence_label, reduction="sum"),
        len(batch.next_sentence_label) - 1,
    ]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_flops_of_bert_base():
    """2 P + 4 L E S forward for each token, P = 84.9 million, but for the last layer past its attention."""
    config = fastbert.BertConfig()
    body = training_flops(config, "mlm", tokens=512, sequences=1, labels=0, squares=512.0**2)
    P, L, E, S = 84.934656e6, 12, 768, 512
    past = 9 * E * E
    assert body == pytest.approx(3 * 512 * (2 * (P - past) + 4 * L * E * S), rel=1e-9)
    head = training_flops(config, "mlm", tokens=512, sequences=1, labels=77, squares=512.0**2) - body
    assert head == pytest.approx(3 * 77 * 2 * (past + 768 * 768 + 768 * 30522), rel=1e-9)


def test_counts_of_a_batch():
    config, batch = fastbert.BertConfig(**SIZES), MadeUpBatches().batch(0)
    lengths = batch.cu_seqlens.diff().tolist()
    counts = MicroBatch.of(batch, config, "mlm_nsp", "cpu").counts
    assert (counts.sequences, counts.tokens) == (len(lengths), sum(lengths))
    assert counts.labels == sum(label != -100 for label in batch.labels.tolist()) > 0
    squares = sum(length**2 for length in lengths)
    sizes = {"tokens": sum(lengths), "sequences": len(lengths), "labels": counts.labels}
    assert counts.flops == training_flops(config, "mlm_nsp", squares=squares, **sizes)


def test_shards_without_pairs_cannot_train_next_sentences():
    batch = MadeUpBatches(pairs=False).batch(0)
    config = fastbert.BertConfig(**SIZES)
    assert MicroBatch.of(batch, config, "mlm", "cpu").counts.labels
    with pytest.raises(ValueError, match=r"training\.objective is 'mlm_nsp'.* no next-sentence pairs"):
        MicroBatch.of(batch, config, "mlm_nsp", "cpu")
