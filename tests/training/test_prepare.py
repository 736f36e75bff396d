"""From text to shards: what is in them, vocabularies, and runs over processes, killed and continued."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from cli_support import run
from training_text import VOCAB, make_documents, prepared, write_documents, write_vocab

from fastbert.inference.records import InputError
from fastbert.tokenizer.bert import BertTokenizer
from fastbert.training.prepare import JOURNAL, PrepareError, PrepareSettings, prepare
from fastbert.training.shards import Shards
from fastbert.training.vocabulary import learn_vocabulary

TOKENIZER = BertTokenizer(VOCAB)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def segments(shards):
    """(label, first segment, second segment) of each example, as lists of tokens without special ones."""
    examples = shards.read(np.arange(len(shards)))
    found = []
    for i, label in enumerate(examples.labels.tolist()):
        row = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]]
        second = int(examples.seconds[i])
        found.append((label, row[1 : second - 1].tolist(), row[second:-1].tolist()))
    return found


def words(ids):
    return TOKENIZER.decode(ids).split()


def test_pairs_of_text_are_what_the_text_says(tmp_path):
    texts = make_documents(80, sentences=(2, 12))
    source = write_documents(tmp_path / "text.txt", texts)
    settings = PrepareSettings(max_length=64, shard_bytes=6000)
    summary = prepare([source], tmp_path / "out", settings, vocab=write_vocab(tmp_path / "vocab.txt"))
    shards = Shards(tmp_path / "out")
    assert summary.shards == len(list((tmp_path / "out").glob("*.shard"))) > 2
    assert summary.splits["train"] == shards.counts and shards.counts.documents == 80
    assert shards.counts.sentences == sum(len(text.split("\n")) for text in texts)
    flat = [" ".join(words(TOKENIZER.encode_plain([text])[0])) for text in texts]
    found = segments(shards)
    assert 0.4 < np.mean([label for label, *_ in found]) < 0.7
    for label, a, b in found:
        # A number is one document's, so that where a segment is found says whose it is.
        a_in = {i for i, text in enumerate(flat) if " ".join(words(a)).removeprefix("##") in text}
        b_in = {i for i, text in enumerate(flat) if " ".join(words(b)).removeprefix("##") in text}
        assert a_in and b_in
        if len(a) > 8 and len(b) > 8 and label == 0:
            assert a_in & b_in
        if len(a) > 20 and len(b) > 20 and label == 1:
            assert not a_in & b_in


def test_text_that_spells_special_tokens_is_text(tmp_path):
    vocab = [*VOCAB, "[", "]", "sep", "mask"]
    source = write_documents(tmp_path / "a.txt", ["ba [SEP] ke [MASK]", "di [SEP] lo"])
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    prepare([source], tmp_path / "out", PrepareSettings(pairs=False), vocab=tmp_path / "vocab.txt")
    examples = Shards(tmp_path / "out").read(np.arange(2))
    tokens = Shards(tmp_path / "out").tokenizer.convert_ids_to_tokens(examples.tokens.tolist())
    assert tokens[:12] == ["[CLS]", "ba", "[", "sep", "]", "ke", "[", "mask", "]", "[SEP]", "[CLS]", "di"]


def test_held_out_documents_are_a_share_whatever_the_rest(tmp_path):
    texts = make_documents(600)
    vocab, settings = write_vocab(tmp_path / "vocab.txt"), PrepareSettings(max_length=500, held_out=0.25, pairs=False)

    def held_out(name, texts, **changes):
        out = tmp_path / name
        prepare(
            [write_documents(tmp_path / f"{name}.txt", texts)],
            out,
            PrepareSettings(**vars(settings) | changes),
            vocab=vocab,
        )
        sides = [
            {re.match(r"\d+ ?", TOKENIZER.decode(a))[0].strip() for _, a, _ in segments(Shards(out, split))}
            for split in ("train", "held_out")
        ]
        counts = [Shards(out, split).counts.documents for split in ("train", "held_out")]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == len(set(texts)) and sum(counts) == len(texts)
        return sides[1]

    first = held_out("all", texts)
    assert abs(len(first) / 600 - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 600)
    assert held_out("cut", texts, shard_bytes=9000) == first
    assert held_out("half", texts[:300]) == {name for name in first if int(name) < 300}
    assert held_out("twice", texts + texts[:50]) == first  # no copy of a held-out document is trained on
    assert held_out("seed", texts, seed=1) != first


# Vocabularies


def test_a_learned_vocabulary_is_the_same_each_time_and_spells_the_text():
    rng = Random(4)
    texts = [
        " ".join("".join(rng.choice("abcdeföü") for _ in range(rng.randint(1, 7))) for _ in range(9)) + " Ω"
        for _ in range(400)
    ]
    learned = [learn_vocabulary(lambda: iter(texts), 150) for _ in range(3)]
    vocabs = [tokenizer.get_vocab() for tokenizer in learned]
    assert vocabs[0] == vocabs[1] == vocabs[2] and len(vocabs[0]) == 150
    assert [vocabs[0][token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert sum(len(token.removeprefix("##")) > 1 for token in vocabs[0]) > 100
    tokenizer = learned[0]
    assert not any(tokenizer.unk_token_id in row for row in tokenizer.encode_plain(texts))
    assert tokenizer.tokenize("ABC") == tokenizer.tokenize("abc") and "ω" in vocabs[0]
    cased = learn_vocabulary(lambda: iter([*texts, "Ab AB"]), 150, lower=False)
    assert "A" in cased.get_vocab() and "ö" in cased.get_vocab() and "o" not in cased.get_vocab()
    with pytest.raises(ValueError, match=r"a vocabulary of 20 tokens has no room .* it takes \d+"):
        learn_vocabulary(lambda: iter(texts), 20)


def test_transformers_reads_the_tokenizer_of_a_prepared_folder(tmp_path):
    from transformers import AutoTokenizer

    source = write_documents(tmp_path / "a.txt", make_documents(30))
    for name, options in (("learned", {"learn_vocab": 80}), ("given", {"vocab": write_vocab(tmp_path / "vocab.txt")})):
        prepare([source], tmp_path / name, PrepareSettings(max_length=32), **options)
        theirs, ours = AutoTokenizer.from_pretrained(tmp_path / name), Shards(tmp_path / name).tokenizer
        assert theirs("Bake 7 dilo. lomu!")["input_ids"] == ours("Bake 7 dilo. lomu!")["input_ids"]
        assert theirs.get_vocab() == ours.get_vocab() and (tmp_path / name / "vocab.txt").exists()
    prepare([source], tmp_path / "folder", PrepareSettings(max_length=32), vocab=tmp_path / "given")
    assert files_of(tmp_path / "folder") == files_of(tmp_path / "given")


# Runs

SETTINGS = PrepareSettings(max_length=48, shard_bytes=12_000, held_out=0.2)
# A run that is to be killed halts before a shard, in each of its processes, once there are `halt`: however fast the
# machine is, the kill finds it going on. A process of a pool runs this file, too.
PREPARE = """
import sys, time
from pathlib import Path
from fastbert.training import prepare as module
from fastbert.training.prepare import PrepareSettings, prepare
folder, processes, halt = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
write = module.write_shard
def write_or_halt(path, *rest):
    while len(list(path.parent.glob("*.shard"))) >= halt:
        time.sleep(0.01)
    write(path, *rest)
module.write_shard = write_or_halt
if __name__ == "__main__":
    settings = PrepareSettings(max_length=48, shard_bytes=12_000, held_out=0.2)
    prepare([folder / "text.txt"], folder / "out", settings, learn_vocab=120, processes=processes, resume=True)
"""


def in_process_of_its_own(folder, processes, halt=1000):
    script = folder / "script.py"
    script.write_text(PREPARE)
    return subprocess.Popen(
        [sys.executable, script, str(folder), str(processes), str(halt)], stderr=subprocess.PIPE, text=True
    )


def test_bytes_are_the_same_for_any_number_of_processes_and_after_a_kill(tmp_path):
    source = write_documents(tmp_path / "text.txt", make_documents(1200))
    prepare([source], tmp_path / "one", SETTINGS, learn_vocab=120)
    one = files_of(tmp_path / "one")
    assert len(one) > 25 and "held_out-00001.shard" in one
    run = in_process_of_its_own(tmp_path, 2, halt=6)
    out = tmp_path / "out"
    while len(list(out.glob("*.shard"))) < 6:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    run.stderr.read()  # ends when the last of its workers has ended, which must not outlive it
    assert (out / JOURNAL).exists() and not (out / "index.json").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.shard")}
    assert 6 <= len(before) < len(one) - 6
    resumed = in_process_of_its_own(tmp_path, 2)
    assert resumed.wait() == 0, resumed.stderr.read()
    resumed.stderr.close()
    run.stderr.close()
    assert files_of(out) == one
    assert all(path.stat().st_mtime_ns == made for path, made in before.items())


def test_killed_before_each_step_a_run_goes_on(tmp_path):
    write_documents(tmp_path / "text.txt", make_documents(40))
    driver = Path(__file__).parents[1] / "prepare_driver.py"
    done = subprocess.run([sys.executable, driver, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] > 25 and report["identical"] == report["kept"] == report["kills"]
    assert sum(name.endswith(".shard") for name in report["files"]) >= 3 and JOURNAL not in report["files"]


def test_seeds_and_nothing_else_change_what_is_drawn(tmp_path):
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        made[name] = files_of(prepared(tmp_path / name, PrepareSettings(max_length=40, seed=seed)))
    assert made["a"] == made["b"] and made["a"]["train-00000.shard"] != made["c"]["train-00000.shard"]


def interrupted(tmp_path, monkeypatch, **options):
    """A folder in which a run failed before its third shard."""
    from fastbert.training import prepare as module

    write, calls = module.write_shard, []

    def fail_at_third(path, *rest):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(28, "No space left on device", str(path))
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", fail_at_third)
        with pytest.raises(OSError, match="No space left"):
            prepared(tmp_path, SETTINGS, count=200, **options)
    return tmp_path / "data"


def test_what_a_run_may_go_on_with(tmp_path, monkeypatch):
    out = interrupted(tmp_path, monkeypatch)
    names = ["journal", "train-00000", "train-00001"]
    assert sum(any(name in path.name for name in names) for path in out.iterdir()) == 3
    source, vocab = tmp_path / "text.txt", tmp_path / "vocab.txt"

    def again(settings=SETTINGS, vocab=vocab, **options):
        return prepare([source], out, settings, vocab=vocab, **options)

    with pytest.raises(PrepareError, match=r"journal.json is left of an interrupted run: --resume continues it"):
        again()
    with pytest.raises(PrepareError, match="max_length was 48 and is 40 now"):
        again(PrepareSettings(**vars(SETTINGS) | {"max_length": 40}), resume=True)
    with pytest.raises(PrepareError, match=r"vocabulary was .* and is 'learned, 99 tokens' now"):
        again(vocab=None, learn_vocab=99, resume=True)
    times = source.stat()
    source.write_text(source.read_text() + "\n\nmore text\n")
    with pytest.raises(PrepareError, match="inputs have changed"):
        again(resume=True)
    os.truncate(source, times.st_size)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    damaged = out / "train-00001.shard"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    summary = again(resume=True)
    assert summary.resumed == 1 and summary.shards > 4
    whole = files_of(out)
    with pytest.raises(PrepareError, match=r"holds prepared data: --restart makes it again"):
        again(resume=True)
    assert again(restart=True).resumed == 0 and files_of(out) == whole
    (out / "index.json").rename(out / "other.json")
    with pytest.raises(PrepareError, match=r"data is not empty: it holds held_out-00000.shard"):
        again()
    (out / JOURNAL).write_text("{")
    with pytest.raises(PrepareError, match="is no journal of a run"):
        again(resume=True)


def test_one_run_at_a_time(tmp_path):
    import fcntl

    out = tmp_path / "data"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(PrepareError, match="another process is writing"):
        prepared(tmp_path, SETTINGS)
    os.close(handle)
    prepared(tmp_path, SETTINGS)


def test_text_that_makes_no_examples(tmp_path):
    vocab = write_vocab(tmp_path / "vocab.txt")

    def attempt(texts, message, processes=1, **settings):
        source = write_documents(tmp_path / "a.txt", texts)
        with pytest.raises(InputError, match=message):
            prepare(
                [source], tmp_path / "out", PrepareSettings(**settings), vocab=vocab, restart=True, processes=processes
            )

    attempt(["ba ke"], r"train-00000.shard \(.*a.txt\): one document alone, and pairs take .* from another; separate")
    attempt(make_documents(30), "held_out is 1e-09, which of 30 documents holds out none", held_out=1e-9)
    attempt(["ba ke", "\x01", "di"], r"a.txt:3 holds no token")
    attempt([*make_documents(90), "\x01", "di"] * 3, r"a.txt:\d+ holds no token", processes=2, shard_bytes=9000)
    attempt(["\x01", "\x02"], "no document of the inputs is left to train on", skip_bad=True)
    (tmp_path / "bad.txt").write_bytes(b"good\n\nbad \xff text\n\nba\n\nke")
    with pytest.raises(InputError, match=r"bad.txt:3 is not UTF-8 \(byte 0xff at byte 5 of the document\)"):
        prepare([tmp_path / "bad.txt"], tmp_path / "out", vocab=vocab, restart=True)
    summary = prepare(
        [tmp_path / "bad.txt"], tmp_path / "out", PrepareSettings(skip_bad=True), vocab=vocab, restart=True
    )
    assert summary.splits["train"].skipped == 1 and summary.splits["train"].documents == 3


def test_settings_that_do_not_go_together(tmp_path):
    for settings, message in (
        ({"max_length": 4}, "max_length is 4; it must be at least 5"),
        ({"held_out": 1.0}, "held_out is 1.0; it must be at least 0 and below 1"),
        ({"short_seq_prob": 2.0}, "short_seq_prob is 2.0; it must be at least 0 and at most 1"),
        ({"shard_bytes": 0}, "shard_bytes is 0; it must be at least 1"),
        ({"seed": 2**200}, f"seed is {2**200}; it must be at least .* and at most {2**63 - 1}"),
    ):
        with pytest.raises(ValueError, match=message):
            PrepareSettings(**settings)
    source, vocab = write_documents(tmp_path / "a.txt", make_documents(9)), write_vocab(tmp_path / "vocab.txt")
    for options, message in (
        ({}, "one of vocab and learn_vocab"),
        ({"vocab": vocab, "learn_vocab": 9}, "one of vocab and learn_vocab"),
        ({"vocab": tmp_path / "gone"}, "gone: no such vocabulary"),
        ({"vocab": tmp_path, "lower": True}, "lower is True; the tokenizer in .* says itself"),
        ({"learn_vocab": 10}, "a vocabulary of 10 tokens has no room"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare([source], tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(PrepareError, match=r"a\.txt is a file; it must be a folder"):
        prepare([source], source, vocab=vocab)


# The command line


def test_the_command(tmp_path, capsys):
    rows = [json.dumps({"body": text}) for text in make_documents(80)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, "{}"]))
    args = ["prepare", tmp_path / "a.jsonl", "-o", tmp_path / "out", "--field", "body", "--learn-vocab", 90]
    args += ["--held-out", 0.2, "--max-length", 40, "--no-lower", "--seed", 5]
    code, out, err = run(capsys, *args)
    assert (code, out) == (1, "") and err == f"fastbert: error: {tmp_path}/a.jsonl:81 has no field 'body'\n"
    code, out, err = run(capsys, *args, "--bad-documents", "skip", "--no-pairs")
    assert (code, out) == (0, "")
    shards = Shards(tmp_path / "out")
    counts = shards.counts
    assert "1 documents skipped" in err and re.search(r"held_out: \d+ documents", err)
    assert (
        f"train: {counts.documents} documents, {counts.sentences} sentences, {counts.examples} examples, "
        f"{counts.tokens:,} tokens"
    ) in err
    assert re.search(
        r"2 shards, [\d,]+ bytes, vocabulary of 90 tokens to \S+out; [\d,]+ tokens of text in .* tokens/s", err
    )
    assert not shards.pairs and shards.max_length == 40 and shards.counts.skipped == 1
    assert shards.tokenizer("Ba")["input_ids"] != shards.tokenizer("ba")["input_ids"]
    code, _, err = run(capsys, *args)
    assert code == 1 and "holds prepared data: --restart makes it again" in err
    code, out, err = run(capsys, *args, "--restart", "--bad-documents", "skip", "-q")
    assert (code, out) == (0, "") and err.startswith("fastbert: 1 documents skipped\nfastbert: ")
    assert err.count("\n") == 2 and "sentences have more than the 37 tokens of text that --max-length 40 leaves" in err


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("mode, room", [("--pairs", 17), ("--no-pairs", 18)])
def test_sentences_longer_than_an_example_are_counted(tmp_path, capsys, mode, room, processes):
    documents = make_documents(40)
    text, vocab = write_documents(tmp_path / "a.txt", documents), write_vocab(tmp_path / "vocab.txt")
    lengths = [len(TOKENIZER.tokenize(line)) for document in documents for line in document.splitlines()]
    long = sum(length > room for length in lengths)
    args = ["prepare", text, "-o", tmp_path / "out", "--vocab", vocab, "--held-out", 0.2, "-q", mode]
    code, _, err = run(capsys, *args, "--max-length", 20, "--processes", processes)
    become = {"--pairs": "the rest of them is dropped", "--no-pairs": "they are split over several examples"}[mode]
    assert code == 0 and 0 < long < len(lengths)
    assert err == (
        f"fastbert: {long} of {len(lengths)} sentences have more than the {room} tokens of text that --max-length 20 "
        f"leaves room for: {become}\n"
    )
    code, _, err = run(capsys, *args, "--max-length", 200, "--restart")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("mode", ["--pairs", "--no-pairs"])
def test_text_that_the_vocabulary_does_not_know_is_told(tmp_path, capsys, mode):
    vocab = write_vocab(tmp_path / "vocab.txt")
    foreign = write_documents(tmp_path / "foreign.txt", ["привет всем ba\nпока ещё ke"] * 9)
    fitting = write_documents(tmp_path / "fitting.txt", ["ba ke привет\nbake dilo пока"] * 9)
    more = [write_documents(tmp_path / f"{name}.txt", ["привет\nba"]) for name in "bcd"]
    args = ["prepare", "--vocab", vocab, "-q", mode, "--max-length", 20]
    code, _, err = run(capsys, *args, foreign, "-o", tmp_path / "out")
    assert code == 0
    assert re.fullmatch(
        rf"fastbert: warning: {foreign}: 6[67]% of the tokens are \[UNK\]; the model's vocabulary does not fit .*\n",
        err,
    )
    code, _, err = run(capsys, *args, foreign, *more, "-o", tmp_path / "more")
    assert code == 0 and err.count("\n") == 1 and f"{foreign}, {more[0]}, {more[1]} and 1 more: 6" in err
    code, _, err = run(capsys, *args, fitting, "-o", tmp_path / "fits")
    assert (code, err) == (0, "")
    examples = Shards(tmp_path / "fits").read(np.arange(len(Shards(tmp_path / "fits"))))
    assert Shards(tmp_path / "fits").counts.unknown == (examples.tokens == TOKENIZER.unk_token_id).sum() > 0


def test_what_was_counted_is_told_after_an_interruption_too(tmp_path, capsys):
    """The figures are the shards' own: those that the run before made count."""
    foreign = write_documents(tmp_path / "foreign.txt", ["привет всем ba\nпока ещё ke"] * 9)
    args = ["prepare", foreign, "--vocab", write_vocab(tmp_path / "vocab.txt"), "-q", "--max-length", 20]
    code, _, told = run(capsys, *args, "-o", tmp_path / "out")
    assert code == 0 and "are [UNK]" in told
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbert.training.prepare.write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare([foreign], tmp_path / "again", PrepareSettings(max_length=20), vocab=tmp_path / "vocab.txt")
    assert (tmp_path / "again" / JOURNAL).exists()
    code, _, err = run(capsys, *args, "-o", tmp_path / "again", "--resume")
    assert (code, err) == (0, told)


def test_a_learned_vocabulary_smaller_than_asked_is_told(tmp_path, capsys):
    text = write_documents(tmp_path / "a.txt", make_documents(20))
    code, _, err = run(capsys, "prepare", text, "-o", tmp_path / "out", "--learn-vocab", 5000, "-q")
    size = Shards(tmp_path / "out").vocabulary.size
    assert code == 0 and size < 5000
    assert err == (
        f"fastbert: warning: the vocabulary has {size} tokens and not 5000: the text has no more that come up 2 times "
        "or more\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --vocab --learn-vocab is required"),
        (["--vocab", "a", "--learn-vocab", "9"], "not allowed with argument"),
        (["--learn-vocab", "9", "--max-length", "3"], "max_length is 3; it must be at least 5"),
        (["--learn-vocab", "9", "--resume", "--restart"], "not allowed with argument"),
    ],
)
def test_usage(tmp_path, capsys, options, message):
    code, _, err = run(capsys, "prepare", tmp_path / "a.txt", "-o", tmp_path / "out", *options)
    assert code == 2 and message in err


@pytest.mark.slow
def test_wikipedia_leads(tmp_path):
    from assets import AssetUnavailable, fetch

    try:
        leads = json.loads((fetch("wiki-leads") / "summaries_en-us.json").read_text())
    except AssetUnavailable as reason:
        pytest.skip(f"wiki-leads cannot be had: {reason}")
    texts = [re.sub(r"\n\s*\n", "\n", lead["extract"]).strip() for lead in leads.values()]
    source = write_documents(tmp_path / "wiki.txt", texts)
    out = tmp_path / "out"
    settings = PrepareSettings(max_length=128, pairs=False, held_out=0.05, shard_bytes=1 << 20)
    prepare([source], out, settings, learn_vocab=8000, processes=2)
    splits = {split: Shards(out, split) for split in ("train", "held_out")}
    assert sum(shards.counts.documents for shards in splits.values()) == len(texts) == 10_033
    assert 0.04 < splits["held_out"].counts.documents / len(texts) < 0.06
    tokenizer = splits["train"].tokenizer
    assert len(tokenizer) == 8000
    # Runs decode back to the text: every document, its tokens in order and complete, in one of the splits.
    decoded = {
        "".join(tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in tokenizer.encode_plain(texts)
    }
    rebuilt, unknown = [], 0
    for shards in splits.values():
        shards.verify()
        rows = [a for _, a, _ in segments(shards)]
        unknown += sum(row.count(tokenizer.unk_token_id) for row in rows)
        rebuilt += ["".join(tokenizer.decode(row, skip_special_tokens=True).split()) for row in rows]
    assert unknown < 100  # of more than a million
    joined = "\n".join(rebuilt).replace("\n", "")
    assert sum(map(len, decoded)) <= len(joined) + 10_000
    assert sum(text in joined for text in decoded) > 0.999 * len(decoded)
    # Pairs of the same text: a real second segment goes on where the first ends, another document's does not.
    prepare([source], tmp_path / "pairs", PrepareSettings(max_length=128), vocab=out)
    shards = Shards(tmp_path / "pairs")
    squeezed = ["".join(tokenizer.decode(ids).split()) for ids in tokenizer.encode_plain(texts)]
    everything = "\n".join(squeezed)
    found = segments(shards)
    assert 0.5 < np.mean([label for label, *_ in found]) < 0.7  # leads are short: many ends, which have no next
    real = joint = 0
    for label, a, b in found[:3000]:
        if len(a) + len(b) < 125:  # nothing cut off
            together = "".join(tokenizer.decode(a + b).split())
            real += (label == 0) == (together in everything)
            joint += 1
    assert joint > 1000 and real > 0.99 * joint
