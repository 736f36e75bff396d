"""The files of examples: what is written is read, and what is damaged or foreign is refused with one clear error."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from training_text import VOCAB, prepared

import fastbert
from fastbert.tokenizer.bert import BertTokenizer
from fastbert.training.prepare import PrepareSettings
from fastbert.training.shards import (
    Counts,
    Examples,
    Shard,
    ShardError,
    Shards,
    Vocabulary,
    write_index,
    write_shard,
)

SMALL = Vocabulary(1000, "ab" * 32)


def made_up(lengths, size, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths)
    offsets = np.cumsum([0, *lengths])
    labels = rng.integers(0, 2, len(lengths))
    return Examples(rng.integers(0, size, offsets[-1]), offsets, rng.integers(1, lengths + 1), labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data"), PrepareSettings(max_length=48, shard_bytes=6000))


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
@pytest.mark.parametrize("lengths", [[], [5], [3, 60, 1, 7]])
def test_what_is_written_is_read(tmp_path, size, dtype, lengths):
    examples = made_up(lengths, size)
    if lengths:
        examples.tokens[-1] = size - 1
    vocabulary = Vocabulary(size, "cd" * 32)
    write_shard(tmp_path / "a.shard", examples, vocabulary, Counts(documents=2, sentences=9, skipped=1))
    shard = Shard(tmp_path / "a.shard")
    shard.verify()
    assert shard.tokens.dtype == dtype and shard.vocabulary == vocabulary
    assert shard.counts == Counts(2, 9, 1, len(lengths), sum(lengths))
    for name in ("tokens", "offsets", "seconds", "labels"):
        np.testing.assert_array_equal(getattr(shard, name), getattr(examples, name))
        with pytest.raises(ValueError, match="read-only"):
            getattr(shard, name)[:] = 0


def test_examples_are_numbered_through_all_shards(tmp_path):
    parts = [made_up(lengths, 1000, seed=i) for i, lengths in enumerate([[4, 9], [], [3, 20, 6], [8]])]
    paths = [tmp_path / f"train-{i}.shard" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        write_shard(path, part, SMALL, Counts(documents=1))
    write_index(tmp_path, SMALL, {"max_length": 20, "pairs": True}, {"train": paths})
    shards = Shards(tmp_path)
    assert len(shards) == 6 and shards.counts == Counts(4, 0, 0, 6, 50)
    np.testing.assert_array_equal(shards.lengths(np.arange(6)), [4, 9, 3, 20, 6, 8])
    whole = shards.read(np.arange(6))
    for name in ("tokens", "seconds", "labels"):
        np.testing.assert_array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))
    order = np.array([5, 1, 3, 1])
    some = shards.read(order)
    assert some.tokens.dtype == np.int64
    for i, number in enumerate(order):
        got = some.tokens[some.offsets[i] : some.offsets[i + 1]]
        np.testing.assert_array_equal(got, whole.tokens[whole.offsets[number] : whole.offsets[number + 1]])
        assert (some.seconds[i], some.labels[i]) == (whole.seconds[number], whole.labels[number])
    assert len(shards.read(np.zeros(0, dtype=np.int64)).labels) == 0


def test_a_thousand_shards_keep_no_file_open(tmp_path):
    part = made_up([4], 1000)
    write_shard(tmp_path / "a.shard", part, SMALL, Counts())
    before = len(os.listdir("/proc/self/fd"))
    held = [Shard(tmp_path / "a.shard") for _ in range(300)]
    assert len(os.listdir("/proc/self/fd")) < before + 5 and len(held) == 300


def test_the_folder_knows_its_tokenizer_and_travels(folder):
    shards = Shards(folder)
    assert shards.tokenizer.get_vocab() == BertTokenizer(VOCAB).get_vocab()
    assert shards.vocabulary == Vocabulary.of(BertTokenizer(VOCAB))
    assert shards.vocabulary != Vocabulary.of(BertTokenizer([*VOCAB[:-2], VOCAB[-1], VOCAB[-2]]))
    shards.verify()
    again = pickle.loads(pickle.dumps(shards))
    np.testing.assert_array_equal(again.read(np.arange(9)).tokens, shards.read(np.arange(9)).tokens)


def change(path, position, values):
    data = bytearray(path.read_bytes())
    data[position : position + len(values)] = values
    path.write_bytes(data)


def test_a_file_that_is_no_whole_shard_is_refused(copy):
    path = copy / "train-00001.shard"
    whole = path.read_bytes()
    for data, message in (
        (b"", "is no shard of `fastbert prepare`"),
        (b"PAR1" + whole[4:], "is no shard of `fastbert prepare`"),
        (whole[:100], "is cut short: 100 bytes, less than its header's 128"),
        (whole[:-1], f"is cut short: {len(whole) - 1} bytes, and its header speaks of {len(whole)}"),
        (whole[: len(whole) // 2], "is cut short"),
        (whole + b"x", "is too long"),
        (whole[:8] + b"\x02" + whole[9:], "is a shard of version 2; this is version 1"),
        (whole[:60] + bytes([whole[60] ^ 1]) + whole[61:], "is corrupted: its header does not have the checksum"),
    ):
        path.write_bytes(data)
        with pytest.raises(ShardError, match=message) as caught:
            Shards(copy)
        assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(ShardError, match=r"train-00001.shard is missing; .*index.json names it"):
        Shards(copy)


def test_every_flipped_byte_is_found_by_verify(copy):
    path = copy / "train-00000.shard"
    whole = path.read_bytes()
    for position in range(128, len(whole), len(whole) // 40):
        path.write_bytes(whole)
        change(path, position, bytes([whole[position] ^ 0x40]))
        with pytest.raises(ShardError, match=r"train-00000.shard is corrupted: its content does not have the checksum"):
            Shards(copy).verify()


def test_damage_that_cannot_be_read_is_found_on_reading(copy):
    path = copy / "train-00000.shard"
    shard, whole = Shard(path), path.read_bytes()
    examples, tokens = shard.counts.examples, shard.counts.tokens
    seconds_at = 128 + 8 * (examples + 1)
    tokens_at = seconds_at + 4 * examples
    for position, value, message in (
        (128 + 8, b"\xff\x00", "not between 1 and 48 tokens"),
        (128 + 8, (tokens + 9).to_bytes(8, "little"), "not between 1 and 48 tokens"),
        (128 + 8, b"\xf0" + b"\xff" * 7, "not between 1 and 48 tokens"),
        (seconds_at, b"\xff\xff\x00\x00", "example 0 has an impossible second segment"),
        (tokens_at + 6, b"\xff\xff", "token 65535 is outside the vocabulary"),
        (tokens_at + 2 * tokens, b"\x07", "example 0 has an impossible second segment"),
    ):
        path.write_bytes(whole)
        change(path, position, value)
        with pytest.raises(ShardError, match=message) as caught:
            Shards(copy).read(np.arange(len(Shards(copy))))
        assert str(path) in str(caught.value)


def test_foreign_files_are_refused(copy, tmp_path):
    index = json.loads((copy / "index.json").read_text())
    shutil.copy(copy / "train-00001.shard", copy / "train-00000.shard")
    with pytest.raises(ShardError, match=r"train-00000.shard is foreign"):
        Shards(copy)
    write_shard(copy / "train-00000.shard", made_up([4], 30), SMALL, Counts())
    with pytest.raises(ShardError, match=r"train-00000.shard is of another vocabulary than"):
        Shards(copy)
    for content, message in (
        ("no json", "is no index of shards"),
        ("[]", "is no index of shards"),
        (json.dumps(index | {"format": "other"}), "is no index of shards"),
        (json.dumps(index | {"version": 2}), "is of version 2; this is version 1"),
    ):
        (copy / "index.json").write_text(content)
        with pytest.raises(ShardError, match=message):
            Shards(copy)
    with pytest.raises(ShardError, match=r"holds no prepared data: it has no index\.json"):
        Shards(tmp_path / "nowhere")


def test_a_split_that_was_not_made(folder):
    with pytest.raises(ShardError, match="has no split 'held_out'; it has train"):
        Shards(folder, "held_out")


def test_a_model_that_does_not_match_is_refused(copy):
    shards = Shards(copy)
    fits = {"vocab_size": len(VOCAB), "max_position_embeddings": 48, "hidden_size": 12}
    shards.check_model(fastbert.BertConfig(**fits), BertTokenizer(VOCAB))
    shards.check_model(fastbert.BertConfig(**fits | {"vocab_size": len(VOCAB) + 40}))  # rounded up
    for wrong, message in (
        (
            {"vocab_size": len(VOCAB) - 1},
            f"vocab_size of the model is {len(VOCAB) - 1}; the vocabulary .* has {len(VOCAB)}",
        ),
        ({"vocab_size": 30522}, "vocab_size of the model is 30522"),
        ({"max_position_embeddings": 47}, "max_position_embeddings of the model is 47; .* up to 48 tokens"),
        ({"type_vocab_size": 1}, "type_vocab_size of the model is 1; .* holds pairs"),
    ):
        with pytest.raises(ShardError, match=message):
            shards.check_model(fastbert.BertConfig(**fits | wrong))
    other = BertTokenizer([*VOCAB[:-2], VOCAB[-1], VOCAB[-2]])
    with pytest.raises(ShardError, match="the model's tokenizer has another vocabulary than"):
        shards.check_model(fastbert.BertConfig(**fits), other)
    for path in copy.glob("*.json"):
        if path.name != "index.json":
            path.unlink()
    (copy / "vocab.txt").write_text("\n".join([*VOCAB[:-2], VOCAB[-1], VOCAB[-2]]))
    with pytest.raises(ShardError, match="the tokenizer has another vocabulary than the shards"):
        _ = Shards(copy).tokenizer
