"""Packed batches: what is in them, over epochs, ranks and interruptions."""

import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from training_text import VOCAB, prepared, rows

from fastbert.training.batches import PackedBatches
from fastbert.training.masking import Masking
from fastbert.training.prepare import PrepareSettings
from fastbert.training.shards import Shards

CLS, SEP = VOCAB.index("[CLS]"), VOCAB.index("[SEP]")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    settings = PrepareSettings(max_length=64, shard_bytes=8000, held_out=0.2)
    return Shards(prepared(tmp_path_factory.mktemp("pairs"), settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Shards(prepared(tmp_path_factory.mktemp("runs"), PrepareSettings(max_length=40, pairs=False)))


def batches(shards, tokens=500, seed=3, **options):
    return PackedBatches(shards, tokens_per_batch=tokens, seed=seed, **options)


def stored(shards):
    """The same of each example as the shards hold it, without masks."""
    examples = shards.read(np.arange(len(shards)))
    found = []
    for i, (start, stop) in enumerate(zip(examples.offsets, examples.offsets[1:], strict=False)):
        second = int(examples.seconds[i])
        types = (0,) * second + (1,) * (stop - start - second)
        found.append((tuple(examples.tokens[start:stop].tolist()), types, int(examples.labels[i])))
    return found


def same(a, b):
    return a.max_seqlen == b.max_seqlen and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("input_ids", "token_type_ids", "cu_seqlens", "labels", "next_sentence_label")
    )


def test_a_batch_is_packed_as_the_model_takes_it(shards):
    batch = next(batches(shards))
    lengths = batch.cu_seqlens.diff()
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] <= 500
    assert batch.max_seqlen == lengths.max() and len(batch.next_sentence_label) == len(lengths)
    for column in (batch.input_ids, batch.token_type_ids, batch.labels):
        assert column.dtype == torch.int64 and column.shape == (batch.cu_seqlens[-1],)
    for real, _, types, _ in rows(batch):
        assert real[0] == CLS and real[-1] == SEP and real.count(SEP) == 2
        assert types == (0,) * (real.index(SEP) + 1) + (1,) * (len(real) - real.index(SEP) - 1)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta" and moved.max_seqlen == batch.max_seqlen


def test_runs_have_no_second_segment(runs):
    batch = next(batches(runs))
    assert batch.next_sentence_label is None and not batch.token_type_ids.any()
    assert all(real.count(SEP) == 1 for real, *_ in rows(batch))


def test_batches_are_full_and_the_example_that_does_not_fit_begins_the_next(shards):
    cycle = batches(shards)
    found = [next(cycle) for _ in range(400)]
    assert any(batch.cu_seqlens[-1] == 500 for batch in found)  # one that fits exactly goes in
    for batch, following in pairwise(found):
        assert batch.cu_seqlens[-1] <= 500 < batch.cu_seqlens[-1] + following.cu_seqlens[1]


def test_an_epoch_holds_each_example_once_in_an_order_of_its_own(shards):
    cycle, taken = batches(shards), []
    while len(taken) < 3 * len(shards):
        taken += [(real, types, label) for real, _, types, label in rows(next(cycle))]
    everything, count = sorted(stored(shards)), len(shards)
    epochs = [taken[i * count : (i + 1) * count] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == everything
    assert epochs[0] != epochs[1] != epochs[2] != stored(shards)


def test_epochs_end_where_asked(shards):
    found = list(batches(shards, epochs=2))
    taken = [real for batch in found for real, *_ in rows(batch)]
    assert sorted(taken) == sorted([real for real, *_ in stored(shards)] * 2)
    cycle = batches(shards, epochs=1)
    assert len(list(cycle)) > 3 and list(cycle) == [] and cycle.state_dict()["epoch"] == 1


def test_masks_differ_between_epochs_and_seeds_and_repeat_for_the_same(shards):
    def seen(seed, epochs, tokens):
        return {
            (real, types): ids
            for batch in batches(shards, tokens, seed, epochs=epochs)
            for real, ids, types, _ in rows(batch)
        }

    first, again, other = seen(1, 1, 500), seen(1, 1, 333), seen(2, 1, 500)
    assert first == again  # in batches of another size, too
    both = seen(1, 2, 500)  # the second epoch's, where an example comes twice
    for one in (other, both):
        assert np.mean([one[row] != ids for row, ids in first.items()]) > 0.9


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_have_together_what_one_process_has(shards, world_size):
    alone = batches(shards)
    ranks = [batches(shards, rank=rank, world_size=world_size) for rank in range(world_size)]
    spread = []
    for _ in range(40):  # over several epochs
        whole, parts = next(alone), [next(rank) for rank in ranks]
        assert sorted(rows(whole)) == sorted(row for part in parts for row in rows(part))
        assert all(len(part.cu_seqlens) > 1 for part in parts)
        assert all(rank.state_dict() == alone.state_dict() for rank in ranks)
        spread.append(np.ptp([int(part.cu_seqlens[-1]) for part in parts]))
    assert max(spread) <= shards.max_length


@pytest.mark.parametrize("steps", [0, 1, 9, 31])
def test_going_on_equals_going_through(shards, steps):
    through = batches(shards, masking=Masking(whole_words=True))
    for _ in range(steps):
        next(through)
    state = json.loads(json.dumps(through.state_dict()))
    resumed = batches(shards, masking=Masking(whole_words=True))
    for _ in range(5):  # somewhere else
        next(resumed)
    resumed.load_state_dict(state)
    for _ in range(25):
        assert same(next(through), next(resumed))


def test_on_another_number_of_ranks(shards):
    alone = batches(shards)
    for _ in range(7):
        next(alone)
    ranks = [batches(shards, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    assert sorted(rows(next(alone))) == sorted(row for rank in ranks for row in rows(next(rank)))


def test_another_process_gets_the_same(shards):
    cycle = batches(shards)
    next(cycle)
    copy = pickle.loads(pickle.dumps(cycle))
    assert len(pickle.dumps(cycle)) < 20_000  # the files are opened again, not copied
    assert same(next(cycle), next(copy))


def test_a_batch_larger_than_the_corpus_takes_several_epochs(shards):
    batch = next(batches(shards, 2 * shards.counts.tokens + 200))
    counts = np.unique([hash(real) for real, *_ in rows(batch)], return_counts=True)[1]
    assert batch.cu_seqlens[-1] > 2 * shards.counts.tokens and set(counts) == {2, 3}


def test_held_out_examples_are_others(shards):
    held_out = Shards(shards.folder, "held_out")
    assert len(held_out) > 10
    assert not {real for real, *_ in stored(shards)} & {real for real, *_ in stored(held_out)}


def test_errors(shards):
    with pytest.raises(ValueError, match=r"tokens_per_batch is 63; 1 process with examples of up to 64 tokens take"):
        batches(shards, 63)
    with pytest.raises(ValueError, match=r"tokens_per_batch is 255; 4 processes with .* take at least 256"):
        batches(shards, 255, world_size=4)
    with pytest.raises(ValueError, match="rank is 2; it must be at least 0 and below world_size, 2"):
        batches(shards, rank=2, world_size=2)
    state = batches(shards).state_dict()
    for change, message in (
        ({"seed": 4}, "seed was 4 and is 3 now"),
        ({"examples": 1}, f"examples was 1 and is {len(shards)} now"),
        ({"crc32": 1}, f"crc32 was 1 and is {shards.crc32} now"),
        ({"position": len(shards) + 1}, "is no place in"),
    ):
        with pytest.raises(ValueError, match=message):
            batches(shards).load_state_dict(state | change)
    assert shards.crc32 != Shards(shards.folder, "held_out").crc32
