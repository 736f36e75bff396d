"""Broken and hostile checkpoints: each kind is refused in one error that names file, field, value and limit."""

import json
import os
import re
import shutil
import warnings
import zipfile

import pytest
import safetensors.torch
import torch
import transformers
from finetune_support import make_run
from support import TINY
from tiny_bert import save_tiny

import fastbert
from fastbert import Embedder, FillMask
from fastbert.checkpoint.hub import resolve_file
from fastbert.checkpoint.json_files import DEEPEST, LARGEST, read_json


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("sound") / "model", fastbert.BertForMaskedLM)


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def state_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def assert_refused(load, file, *parts):
    with pytest.raises(ValueError, match=re.escape(file)) as caught:
        load()
    for part in parts:
        assert part in str(caught.value), caught.value


NAN, INF = float("nan"), float("inf")
FRACTION = "it must be a number from 0 to 1"


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("hidden_dropout_prob", "0.1", FRACTION),
        ("hidden_dropout_prob", 1.5, FRACTION),
        ("attention_probs_dropout_prob", [0.1], FRACTION),
        ("attention_probs_dropout_prob", None, FRACTION),
        ("classifier_dropout", "0.1", "it must be null or a number from 0 to 1"),
        ("layer_norm_eps", None, FRACTION),
        ("layer_norm_eps", NAN, FRACTION),
        ("layer_norm_eps", -1, FRACTION),
        ("initializer_range", INF, "it must be a number from 0 to 1000"),
        ("pad_token_id", "0", "it must be null or an integer from 0 to 19, vocab_size - 1"),
        ("pad_token_id", 20, "it must be null or an integer from 0 to 19, vocab_size - 1"),
        ("pad_token_id", -1, "it must be null or an integer from 0 to 19, vocab_size - 1"),
        ("hidden_act", ["gelu"], "it must be the name of an activation"),
        ("hidden_act", "gelo", "known are gelu, "),
        ("num_labels", "3", "it must be an integer from 1 to 1000000"),
        ("num_labels", True, "it must be an integer from 1 to 1000000"),
        ("num_labels", 10**8, "it must be an integer from 1 to 1000000"),
        ("id2label", [], "it must be an object of 1 to 1000000 labels"),
        ("id2label", {}, "it must be an object of 1 to 1000000 labels"),
        ("id2label", {"a": "x"}, "it must be an object of 1 to 1000000 labels"),
        ("id2label", {"0": None}, "it must be an object of 1 to 1000000 labels"),
        ("label2id", {"a": [1]}, "it must be an object of ids by their labels"),
        ("problem_type", "ranking", "it must be null or one of regression, "),
        ("tie_word_embeddings", "yes", "it must be true or false"),
        ("model_type", ["bert"], "fastbert reads 'bert', 'roberta'"),
        ("vocab_size", True, "it must be an integer from 1 to "),
        ("vocab_size", 120.0, "it must be an integer from 1 to "),
        ("num_hidden_layers", 10**8, "it must be an integer from 0 to 1024"),
        ("hidden_size", 10**400, "it must be an integer from 1 to 16384"),
        ("intermediate_size", 10**8, "it must be an integer from 1 to 16777216"),
    ],
)
def test_values_of_config(field, value, limit, folder):
    change(folder / "config.json", **{field: value})
    shown = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "1000000000"
    load = lambda: fastbert.BertForSequenceClassification.from_pretrained(folder)  # noqa: E731
    assert_refused(load, str(folder / "config.json"), f"{field} is {shown}", limit)


def test_values_that_real_folders_hold(folder):
    change(
        folder / "config.json",
        id2label={"0": "no", "1": "yes", "2": 3},
        label2id=None,
        hidden_dropout_prob=0,
        classifier_dropout=None,
        pad_token_id=None,
        return_dict=None,
        output_hidden_states=None,
        num_labels=None,
        architectures=["BertForMaskedLM"],
        gradient_checkpointing=False,
        task_specific_params={"a": {"b": [1]}},
    )
    model = fastbert.BertModel.from_pretrained(folder, add_pooling_layer=False)
    config = model.config
    assert config.num_labels == 3 and config.id2label[2] == 3 and config.hidden_dropout_prob == 0
    assert config.return_dict is True and config.output_hidden_states is False and config.pad_token_id is None
    assert config.to_dict()["task_specific_params"] == {"a": {"b": [1]}}


@pytest.mark.parametrize(
    ("field", "value", "tensor"),
    [
        ("vocab_size", 2**31 - 1, "word_embeddings.weight has shape (20, 48); the config makes it (2147483647, 48)"),
        ("max_position_embeddings", 2**24, "position_embeddings.weight has shape (40, 48)"),
        ("type_vocab_size", 2**24, "token_type_embeddings.weight has shape (2, 48)"),
        ("hidden_size", 16_000, "word_embeddings.weight has shape (20, 48); the config makes it (20, 16000)"),
        ("intermediate_size", 2**24, "intermediate.dense.weight has shape (96, 48)"),
        ("num_hidden_layers", 1024, "no tensor encoder.layer.3.attention.self.query.weight; config: num_hidden_layers"),
    ],
)
def test_sizes_are_compared_with_the_file_before_there_is_a_model(field, value, tensor, folder, monkeypatch):
    change(folder / "config.json", **{field: value})
    monkeypatch.setattr("fastbert.model.pretrained._materialise", lambda *args: pytest.fail("memory is taken"))
    load = lambda: fastbert.BertForMaskedLM.from_pretrained(folder)  # noqa: E731
    assert_refused(load, str(folder / "model.safetensors"), tensor)


@pytest.mark.parametrize(
    ("name", "field", "value", "limit"),
    [
        ("tokenizer_config.json", "model_max_length", INF, "it must be null or an integer of at least 1"),
        ("tokenizer_config.json", "model_max_length", "512", "it must be null or an integer of at least 1"),
        ("tokenizer_config.json", "model_max_length", 0, "it must be null or an integer of at least 1"),
        ("tokenizer_config.json", "do_lower_case", "true", "it must be true or false"),
        ("tokenizer_config.json", "strip_accents", 1, "it must be null or true or false"),
        ("tokenizer_config.json", "padding_side", ["left"], "it must be 'left' or 'right'"),
        ("tokenizer_config.json", "cls_token", 3, "it must be a token"),
        ("tokenizer_config.json", "added_tokens_decoder", [], "it must be an object of tokens by their ids"),
        ("tokenizer_config.json", "added_tokens_decoder", {"-1": {"content": "x"}}, "id from 0 to 4294967295"),
        ("tokenizer_config.json", "additional_special_tokens", "[X]", "it must be a list of tokens"),
        ("special_tokens_map.json", "unk_token", {"content": None}, "it must be a token"),
        ("added_tokens.json", "<x>", "20", "id from 0 to 4294967295"),
        ("tokenizer.json", "added_tokens", {"a": 1}, "it must be a list of objects"),
        ("tokenizer.json", "added_tokens", [{"content": "x", "id": 2**40}], "id from 0 to 4294967295"),
        ("tokenizer.json", "model", {"type": "WordPiece", "vocab": {"a": 2**40}}, "expected tokens with ids from 0"),
    ],
)
def test_values_of_tokenizer_files(name, field, value, limit, folder):
    file = folder / name
    file.exists() or file.write_text("{}")
    change(file, **{field: value})
    assert_refused(lambda: fastbert.BertTokenizer.from_pretrained(folder), str(file), limit)


POOLING = "sentence_transformers.models.Pooling"
T = {"type": "sentence_transformers.models.Transformer"}


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("modules.json", [3], ["a module is 3"]),
        ("modules.json", [T, {"type": POOLING, "path": "../other"}], ["names '../other/config.json'"]),
        ("modules.json", [T, {"type": POOLING, "path": "/etc"}], ["names '/etc/config.json'"]),
        ("1_Pooling/config.json", {"pooling_mode": 3}, ["pooling_mode is 3"]),
        ("sentence_bert_config.json", {"max_seq_length": "9"}, ["max_seq_length is '9'"]),
        ("sentence_bert_config.json", {"max_seq_length": 2}, ["are 2, ", "each must be at least 3"]),
        ("sentence_bert_config.json", {"do_lower_case": "no"}, ["do_lower_case is 'no'"]),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, ["prompts is ['a']"]),
        ("config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": "q"}, ["default_prompt_name is"]),
    ],
)
def test_values_of_sentence_transformers_files(name, value, parts, folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "modules.json").write_text(json.dumps([T, {"type": POOLING, "path": "1_Pooling"}]))
    assert Embedder.from_pretrained(folder).pooling == "mean"
    (folder / name).write_text(json.dumps(value))
    assert_refused(lambda: Embedder.from_pretrained(folder), name, *parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, f"is nested more than {DEEPEST} levels deep"),
        (b'{"a":' * 100_000, f"is nested more than {DEEPEST} levels deep"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, f"is nested more than {DEEPEST} levels deep"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' occurs twice in one object"),
        (b'{"a": "\\ud800"}', "is not a JSON file: 'utf-8' codec can't encode"),
        (b"\xff", "is not a JSON file"),
        (b"", "is not a JSON file"),
        (b"9" * 5000, "is not a JSON file: Exceeds the limit"),
        (b"[1]", "holds a list, not a JSON object"),
        (b" " * (LARGEST + 1), f"is longer than {LARGEST} bytes"),
    ],
)
def test_every_json_file_has_one_reader(content, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    assert_refused(lambda: read_json(file), str(file), message)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "model.safetensors.index.json",
    ],
)
def test_nested_json_in_each_file(name, folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "modules.json").write_text(json.dumps([T, {"type": POOLING, "path": "1_Pooling"}]))
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).write_text('{"a":' * 100_000)
    assert_refused(lambda: Embedder.from_pretrained(folder), str(folder / name), "levels deep")


def pickled(folder, state=None, **options):
    state = state_of(folder) if state is None else state
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", **options)
    return folder / "pytorch_model.bin"


def rewrite_archive(file, record=lambda name, content: content, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in records:
            archive.writestr(name, record(name, content))


def assert_same(model, expected):
    for name, tensor in expected.items():
        assert torch.equal(model.get_parameter(name), tensor), name


@pytest.mark.parametrize(
    "form", ["as saved", "no checksums", "stored", "deflated", "legacy", "big-endian", "views", "half"]
)
def test_every_form_of_a_pickled_file(form, folder, monkeypatch):
    expected, state = state_of(folder), state_of(folder)
    if form == "views":  # strides, offsets, and a storage that two tensors share
        storage = torch.empty(sum(t.numel() for t in state.values()) + 7)
        at = 7
        for name, tensor in expected.items():
            flat = storage[at : at + tensor.numel()]
            at += tensor.numel()
            state[name] = flat.view(tensor.shape) if tensor.dim() < 2 else flat.view(tensor.mT.shape).mT
            state[name].copy_(tensor)
    if form == "half":
        state = {name: t.half() if i % 2 else t.bfloat16() for i, (name, t) in enumerate(expected.items())}
        expected = {name: t.float() for name, t in state.items()}
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.get_crc32_options", lambda: form != "no checksums")
        if form == "big-endian":
            # What such a machine writes: bytes in its order, and its name.
            state = {name: torch.from_numpy(t.numpy().byteswap()) for name, t in state.items()}
            patch.setattr("torch.serialization.sys.byteorder", "big")
        file = pickled(folder, state, _use_new_zipfile_serialization=form != "legacy")
    if form in ("stored", "deflated"):
        rewrite_archive(file, method=zipfile.ZIP_DEFLATED if form == "deflated" else zipfile.ZIP_STORED)
    assert_same(fastbert.BertForMaskedLM.from_pretrained(folder, dtype=torch.float32), expected)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("change", ["short", "long", "empty"])
def test_a_record_that_is_not_its_tensor(change, method, folder):
    file = pickled(folder)
    record = {"short": lambda r: r[:-4], "long": lambda r: r + r, "empty": lambda r: b""}[change]
    rewrite_archive(file, lambda name, r: record(r) if name.endswith("data/5") else r, method)
    assert_refused(
        lambda: fastbert.BertForMaskedLM.from_pretrained(folder), str(file), "is truncated or no checkpoint", "bytes"
    )


def test_a_number_that_is_damaged(folder):
    file = pickled(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert_refused(lambda: fastbert.BertForMaskedLM.from_pretrained(folder), str(file), "data/", "checksum")


@pytest.mark.parametrize("at", [0, 26, 27, 28, 29, 30])
def test_a_damaged_header_of_a_record(at, folder):
    """Signature, lengths of the name and of what follows it, and name: where the record begins follows from them."""
    file = pickled(folder)
    with zipfile.ZipFile(file) as archive:
        begin = next(e.header_offset for e in archive.infolist() if e.filename.endswith("data/5"))
    content = bytearray(file.read_bytes())
    content[begin + at] ^= 4
    file.write_bytes(content)
    assert_refused(lambda: fastbert.BertForMaskedLM.from_pretrained(folder), str(file), "is truncated or no checkpoint")


def test_an_archive_that_unpacks_to_much_more(folder, monkeypatch):
    file = pickled(folder)
    rewrite_archive(file, lambda name, r: bytes(1 << 20) if name.endswith("version") else r, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr("fastbert.checkpoint.pickled_file._SPARE", 1 << 19)
    assert_refused(lambda: fastbert.BertForMaskedLM.from_pretrained(folder), str(file), "unpack to", "the limit is")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda t: t.to_sparse(), "a weight is dense and real"),
        (lambda t: torch.complex(t, t), "a weight is dense and real"),
        (lambda t: t.to(torch.int32), "has dtype torch.int32; a weight is no integer"),
    ],
)
def test_tensors_that_are_no_weights(kind, message, folder):
    state = state_of(folder)
    name = "bert.encoder.layer.0.output.dense.weight"
    file = pickled(folder, {**state, name: kind(state[name])})
    assert_refused(
        lambda: fastbert.BertForMaskedLM.from_pretrained(folder), str(file), name.removeprefix("bert."), message
    )


def test_a_model_of_integers_has_no_dtype(folder):
    file = pickled(folder, {name: t.to(torch.float8_e4m3fn) for name, t in state_of(folder).items()})
    load = lambda: fastbert.BertForMaskedLM.from_pretrained(folder)  # noqa: E731
    assert_refused(load, str(file), "has dtype torch.float8_e4m3fn; a model runs in one of", "choose it with dtype")


def test_one_tensor_under_two_names(folder):
    state, name = state_of(folder), "embeddings.LayerNorm.bias"
    safetensors.torch.save_file({**state, name: state[f"bert.{name}"] + 1}, folder / "model.safetensors")
    load = lambda: fastbert.BertForMaskedLM.from_pretrained(folder)  # noqa: E731
    assert_refused(load, str(folder / "model.safetensors"), f"'bert.{name}'", f"'{name}'", f"are both {name}")


def sharded(folder):
    model = fastbert.BertForMaskedLM.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    return model, index, json.loads(index.read_text())


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "a/b", "..", "", ".", "a\\b", "a\0b", "x" * 300, 3, None]
)
def test_a_shard_outside_the_folder(shard, folder):
    _, index, content = sharded(folder)
    (folder.parent / "other.safetensors").write_bytes(next(folder.glob("model-*")).read_bytes())
    content["weight_map"]["bert.embeddings.LayerNorm.bias"] = shard
    index.write_text(json.dumps(content))
    assert_refused(lambda: fastbert.BertForMaskedLM.from_pretrained(folder), str(index), f"names {shard!r}"[:30])


def test_a_missing_shard_names_the_index(folder):
    _, index, _ = sharded(folder)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{index}: no file 'model-00002")):
        fastbert.BertForMaskedLM.from_pretrained(folder)


def test_links_of_shards(folder, tmp_path):
    model, index, content = sharded(folder)
    expected = dict(model.named_parameters())
    shard = folder / next(iter(content["weight_map"].values()))
    # The hub's cache: what a snapshot holds are links to blobs, and nothing else.
    cached = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--name" / "blobs"
    cached.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(folder.iterdir()):
        shutil.copy(file, blobs / str(i))
        (cached / file.name).symlink_to(f"../../blobs/{i}")
    assert_same(fastbert.BertForMaskedLM.from_pretrained(cached), expected)
    os.symlink(cached, tmp_path / "link")
    assert_same(fastbert.BertForMaskedLM.from_pretrained(tmp_path / "link"), expected)
    # A link within the folder.
    inside = folder / "inside"
    shard.rename(inside)
    shard.symlink_to("inside")
    assert_same(fastbert.BertForMaskedLM.from_pretrained(folder), expected)
    # One that leads out.
    inside.rename(tmp_path / "outside")
    shard.unlink()
    shard.symlink_to(tmp_path / "outside")
    load = lambda: fastbert.BertForMaskedLM.from_pretrained(folder)  # noqa: E731
    assert_refused(load, str(index), shard.name, "a link that leads out of the folder", "outside")


def test_names_in_folders_are_resolved_within_the_folder(folder):
    index = folder / "modules.json"
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    found = resolve_file(folder, "1_Pooling/config.json", named_by=index)
    assert found == folder / "1_Pooling" / "config.json"
    (folder / "2").symlink_to(folder.parent)
    (folder.parent / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"modules\.json names '2/config\.json', a link that leads out"):
        resolve_file(folder, "2/config.json", named_by=index)


@pytest.mark.parametrize(
    "head", ["BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"]
)
def test_tied_tables_under_the_name_of_the_decoder_alone(head, tmp_path):
    model = transformers.BertForPreTraining(transformers.BertConfig(**TINY))
    model.save_pretrained(tmp_path)
    state = state_of(tmp_path)
    words = state.pop("bert.embeddings.word_embeddings.weight")
    safetensors.torch.save_file({**state, "cls.predictions.decoder.weight": words}, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="newly initialised")  # the head of a classifier
        loaded = getattr(fastbert, head).from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, words)
    if decoder := loaded.get_output_embeddings():
        assert decoder.weight is loaded.get_input_embeddings().weight
    assert_refused(
        lambda: getattr(fastbert, head).from_pretrained(tmp_path, tie_word_embeddings=False),
        "model.safetensors",
        "no tensor bert.embeddings.word_embeddings.weight" if head != "BertModel" else "no tensor embeddings.word",
    )


def test_tied_tables_that_differ(folder):
    state, decoder = state_of(folder), "cls.predictions.decoder.weight"
    words = state["bert.embeddings.word_embeddings.weight"]
    safetensors.torch.save_file({**state, decoder: words.clone()}, folder / "model.safetensors")
    fastbert.BertForMaskedLM.from_pretrained(folder)
    safetensors.torch.save_file({**state, decoder: words + 1}, folder / "model.safetensors")
    load = lambda: fastbert.BertForMaskedLM.from_pretrained(folder)  # noqa: E731
    assert_refused(load, str(folder / "model.safetensors"), decoder, "tie_word_embeddings=False loads both")
    assert torch.equal(
        fastbert.BertModel.from_pretrained(folder, add_pooling_layer=False).get_input_embeddings().weight, words
    )
    untied = fastbert.BertForMaskedLM.from_pretrained(folder, tie_word_embeddings=False)
    assert torch.equal(untied.get_output_embeddings().weight, words + 1)


def test_a_vocabulary_cut_below_the_pad_token_can_be_saved(tmp_path):
    model = fastbert.BertModel(fastbert.BertConfig(**{**TINY, "pad_token_id": 100}))
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path)
    assert fastbert.BertModel.from_pretrained(tmp_path).config.pad_token_id is None


def test_a_config_that_asks_for_tuples_and_states(folder, tmp_path):
    """What the model returns to its user is no concern of the embedder, of fill-mask and of fine-tuning."""
    vectors, filled = Embedder.from_pretrained(folder).embed(["the cat"]), FillMask.from_pretrained(folder)("a [MASK]")
    change(folder / "config.json", return_dict=False, output_hidden_states=True, output_attentions=True)
    model = fastbert.BertModel.from_pretrained(folder, add_pooling_layer=False)
    assert isinstance(model(torch.tensor([[2, 5, 3]])), tuple)
    torch.testing.assert_close(Embedder.from_pretrained(folder).embed(["the cat"]), vectors)
    again = FillMask.from_pretrained(folder)("a [MASK]")
    assert [c.token for c in again[0]] == [c.token for c in filled[0]]
    run = make_run(tmp_path, "classification", model=folder, epochs=1)
    assert run.model.config.return_dict is False
    assert run.run().step == len(run.plan)
