"""Checkpoints: every layout in, safetensors out, bit for bit with transformers, and clear errors."""

import json
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import torch
import transformers
from support import TINY, tokens

import fastbert
from fastbert.checkpoint.hub import MissingFileError
from fastbert.checkpoint.load import Checkpoint, stored_dtype

HEADS = [n for n in fastbert.__all__ if n.startswith("BertFor")] + ["BertModel"]


@pytest.fixture
def folder(tmp_path):
    """A random transformers BertForPreTraining on disk."""
    model = transformers.BertForPreTraining(transformers.BertConfig(**TINY))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def state_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def rewrite(folder, state):
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def assert_equal_states(mine, theirs):
    a, b = mine.state_dict(), theirs.state_dict()
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_both_ways_bit_for_bit(name, tie, dtype, tmp_path):
    config = transformers.BertConfig(**TINY, num_labels=2, tie_word_embeddings=tie)
    theirs = getattr(transformers, name)(config).to(dtype)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = getattr(fastbert, name).from_pretrained(tmp_path / "theirs")
    assert mine.dtype == dtype
    if tie:
        assert_equal_states(mine, theirs)
    mine.save_pretrained(tmp_path / "mine")
    again, report = getattr(transformers, name).from_pretrained(tmp_path / "mine", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_equal_states(getattr(fastbert, name).from_pretrained(tmp_path / "mine"), mine)
    inputs = tokens()[None] if name == "BertForMultipleChoice" else tokens()
    for a, b in zip(again.eval()(inputs).to_tuple(), theirs.eval()(inputs).to_tuple(), strict=True):
        # Not bit for bit: a product's last bit may depend on where in memory its weight lies (MKL's on AVX2).
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 0)


def test_queries_keys_and_values_fused_by_inference_are_saved(folder, tmp_path):
    mine = fastbert.BertModel.from_pretrained(folder)
    with torch.no_grad():
        mine(tokens())
    mine.save_pretrained(tmp_path / "again")
    assert_equal_states(fastbert.BertModel.from_pretrained(tmp_path / "again"), mine)


def test_sharded_both_ways(folder, tmp_path):
    mine = fastbert.BertForPreTraining.from_pretrained(folder)
    mine.save_pretrained(tmp_path / "mine", max_shard_size="40KB")
    assert len(list((tmp_path / "mine").glob("model-*-of-*.safetensors"))) > 2
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path / "mine")
    assert_equal_states(mine, theirs)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert_equal_states(fastbert.BertForPreTraining.from_pretrained(tmp_path / "theirs"), mine)
    mine.save_pretrained(tmp_path / "mine")  # in one file, over the shards
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_with_legacy_names(zipped, folder):
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state_of(folder).items()
    }
    state["bert.embeddings.position_ids"] = torch.arange(40)[None]
    state["some.other.head.weight"] = torch.zeros(3)
    expected = fastbert.BertForPreTraining.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_equal_states(fastbert.BertForPreTraining.from_pretrained(folder), expected)


def test_names_with_and_without_prefix(folder):
    state = state_of(folder)
    expected = fastbert.BertModel.from_pretrained(folder)
    rewrite(folder, {name.removeprefix("bert."): tensor for name, tensor in state.items()})
    assert_equal_states(fastbert.BertModel.from_pretrained(folder), expected)
    assert_equal_states(fastbert.BertForPreTraining.from_pretrained(folder).bert, expected)


def test_new_heads_are_named_in_one_warning(folder):
    with pytest.warns(UserWarning, match=r"newly initialised.*classifier.weight, classifier.bias$") as caught:
        model = fastbert.BertForSequenceClassification.from_pretrained(folder, num_labels=5)
    assert len(caught) == 1
    assert model.classifier.weight.shape == (5, 48) and model.config.num_labels == 5
    assert 0.1 < model.classifier.weight.std() < 0.3 and (model.classifier.bias == 0).all()
    assert not model.training


def test_dtype_and_device(folder):
    model = fastbert.BertModel.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert fastbert.BertModel.from_pretrained(folder).dtype == torch.float32


def test_missing_encoder_tensor(folder):
    state = state_of(folder)
    name = "bert.encoder.layer.1.attention.self.key.weight"
    del state[name]
    rewrite(folder, state)
    with pytest.raises(ValueError, match=f"model.safetensors: no tensor {name.removeprefix('bert.')};"):
        fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["bert.embeddings.position_embeddings.weight", "cls.predictions.transform.dense.weight"]
)
def test_misshapen_tensor(name, folder):
    state = state_of(folder)
    rows, columns = state[name].shape
    state[name] = torch.zeros(rows + 1, columns)
    rewrite(folder, state)
    shapes = rf"has shape \({rows + 1}, {columns}\); the config makes it \({rows}, {columns}\)"
    with pytest.raises(ValueError, match=f"model.safetensors: tensor {name.removeprefix('bert.')} {shapes}"):
        fastbert.BertForPreTraining.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "empty", "text"])
def test_truncated_file(kind, folder):
    file = folder / "model.safetensors"
    if kind == "bin":
        torch.save(state_of(folder), folder / "pytorch_model.bin")
        file.unlink()
        file = folder / "pytorch_model.bin"
    content = {"empty": b"", "text": b"not a checkpoint at all" * 10}.get(kind, file.read_bytes()[:-1000])
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} is truncated or no checkpoint"):
        fastbert.BertModel.from_pretrained(folder)


def test_malicious_pickle_is_refused(folder):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    (folder / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is truncated or no checkpoint"):
        fastbert.BertModel.from_pretrained(folder)


def test_missing_files(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="holds no weights"):
        fastbert.BertModel.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        fastbert.BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'; Bert[A-Za-z]* reads 'bert'"),
        ({"hidden_act": "gelo"}, "hidden_act is 'gelo'; known are gelu, "),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"hidden_size": 50}, "hidden_size 50 is not a multiple of num_attention_heads 4"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be an integer from 1 to 2147483647"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ],
)
def test_bad_config(change, message, folder):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=re.escape(str(folder)) + f".*{message}"):
        fastbert.BertModel.from_pretrained(folder)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not a JSON file"):
        fastbert.BertModel.from_pretrained(folder)


def test_config_round_trip(folder, tmp_path):
    config = fastbert.BertConfig.from_pretrained(folder, num_labels=3)
    config.save_pretrained(tmp_path)
    assert fastbert.BertConfig.from_pretrained(tmp_path) == config
    theirs = transformers.BertConfig.from_pretrained(tmp_path)
    assert theirs.num_labels == 3 and theirs.id2label == config.id2label
    for name in TINY:
        assert getattr(theirs, name) == getattr(config, name)
    ours, defaults = fastbert.BertConfig(), transformers.BertConfig()
    for name in (
        "vocab_size",
        "hidden_size",
        "layer_norm_eps",
        "hidden_act",
        "pad_token_id",
        "initializer_range",
    ):
        assert getattr(ours, name) == getattr(defaults, name)


def test_saving_fails_whole(folder, tmp_path, monkeypatch):
    """A save that dies leaves the last good checkpoint."""
    target = tmp_path / "target"
    shutil.copytree(folder, target)
    before = (target / "model.safetensors").read_bytes()
    real = safetensors.torch.save_file

    def die(state, path, metadata):
        real(dict(list(state.items())[:2]), path, metadata)
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", die)
    with pytest.raises(OSError, match="No space"):
        fastbert.BertModel.from_pretrained(folder).save_pretrained(target)
    assert (target / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]


def test_fewer_layers_than_the_checkpoint(folder):
    """What a student is made from: the first layers of a deeper model."""
    model = fastbert.BertModel.from_pretrained(folder, num_hidden_layers=2)
    assert len(model.encoder.layer) == 2


def test_unknown_keywords_are_refused(folder):
    for keyword in ("num_label", "torch_dtype", "device_map"):
        with pytest.raises(TypeError, match=f"BertConfig has no {keyword}"):
            fastbert.BertModel.from_pretrained(folder, **{keyword: 3})
    with pytest.raises(TypeError, match="add_pooling_layer"):
        fastbert.BertForMaskedLM.from_pretrained(folder, add_pooling_layer=False)


def test_an_untied_decoder_is_new_where_the_checkpoint_has_none(tmp_path):
    transformers.BertModel(transformers.BertConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"cls\.predictions\.decoder\.weight"):
        model = fastbert.BertForMaskedLM.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert not torch.equal(model.cls.predictions.decoder.weight, model.get_input_embeddings().weight)


LOADED = """
import sys, torch, fastbert

def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024

fastbert.BertModel.from_pretrained(sys.argv[1])  # whatever is imported on first use
before = memory("VmRSS")
model = fastbert.BertModel.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print(memory("VmHWM") - before, weights)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_no_second_copy(dtype, folder, tmp_path):
    """Neither of the weights as they were saved, nor of a file's pages."""
    sizes = {
        "vocab_size": 60_000,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }  # 64 MB, and most of it one tensor
    fastbert.BertModel(fastbert.BertConfig(**sizes)).save_pretrained(tmp_path / "large")
    arguments = [str(folder), str(tmp_path / "large"), dtype]
    done = subprocess.run([sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=True)
    peak, weights = map(float, done.stdout.split())
    assert peak <= 1.15 * weights + 8, (peak, weights)


def test_a_file_that_is_replaced_while_it_is_read(folder, monkeypatch):
    """Its tensors would be of two models; the library maps the file again after so many bytes."""
    monkeypatch.setattr("fastbert.checkpoint.safetensors_file._MAPPED", 1000)
    state = state_of(folder)
    with Checkpoint(folder) as checkpoint:
        names = iter(checkpoint.files)
        target = next(names)
        checkpoint.copy_into(torch.empty(checkpoint.shape(target)), target)
        rewrite(folder, {name: tensor + 1 for name, tensor in state.items()})
        with pytest.raises(ValueError, match=r"model\.safetensors: tensor .* the file was changed while it was read"):
            for name in names:
                checkpoint.copy_into(torch.empty(checkpoint.shape(name)), name)


def described(**entry):
    return {"bert.x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}


def two(begin, end, name="bert.y", **first):
    second = {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
    return json.dumps(described(**first))[:-1] + f', "{name}": {json.dumps(second)}' + "}"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("x" * 8, "invalid JSON in header"),
        ("[]", "invalid JSON in header"),
        (described(data_offsets=[0, 12]), "invalid shape, data type, or offset"),
        (described(data_offsets=[8, 0]), "invalid offset"),
        (described(shape=[-2]), "invalid JSON in header"),
        (described(shape="2"), "invalid JSON in header"),
        ({"bert.x": {}}, "missing field `dtype`"),
        (described(dtype="F31"), "unknown variant `F31`"),
        (described(shape=[1], data_offsets=[0, 4]), "not fully covered"),  # bytes are left at the end
        (described(shape=[1], data_offsets=[4, 8]), "invalid offset"),  # a hole before it
        (two(4, 8), "invalid offset"),  # an overlap
        (two(0, 8), "invalid offset"),
        (two(4, 8, name="bert.x", shape=[1], data_offsets=[0, 4]), "invalid offset"),
        (two(0, 8, name="bert.x"), "its header: the key 'bert.x' occurs twice in one object"),
    ],
)
def test_safetensors_that_are_none(header, message, folder):
    header = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no checkpoint: .*" + re.escape(message)):
        fastbert.BertModel.from_pretrained(folder)


def test_a_dtype_that_torch_cannot_read(folder):
    header = json.dumps(
        {"embeddings.word_embeddings.weight": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(1))
    message = r"model\.safetensors: tensor \S+word_embeddings\.weight cannot be read: its dtype is F4; known are"
    with Checkpoint(folder) as checkpoint, pytest.raises(ValueError, match=message):
        stored_dtype(checkpoint)


@pytest.mark.parametrize("stored", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_any_dtype_becomes_any_other(stored, dtype, folder, monkeypatch):
    monkeypatch.setattr("fastbert.checkpoint.safetensors_file._MAPPED", 1000)  # fewer bytes than a table has
    state = {name: tensor.to(stored) for name, tensor in state_of(folder).items()}
    rewrite(folder, state)
    model = fastbert.BertModel.from_pretrained(folder, dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"bert.{name}"].to(dtype or stored)), name


def test_a_head_of_another_size(tmp_path):
    """Encoder and pooler as in transformers; the head new, and drawn as transformers draws it."""
    config = transformers.BertConfig(
        vocab_size=120, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    theirs = transformers.BertForSequenceClassification(config)
    theirs.save_pretrained(tmp_path)
    kind = fastbert.BertForSequenceClassification
    message = r"model\.safetensors: tensor classifier\.weight has shape \(3, 64\); the config makes it \(2, 64\)"
    with pytest.raises(ValueError, match=message + r" \(ignore_mismatched_sizes=True initialises"):
        kind.from_pretrained(tmp_path, num_labels=2)
    for option in (True, "head"):
        with pytest.warns(
            UserWarning, match=f"newly initialised.*{message}; .*tensor classifier.bias has shape"
        ) as seen:
            model = kind.from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=option)
        assert len(seen) == 1 and model.config.num_labels == 2
        expected = theirs.state_dict()
        for name, tensor in model.state_dict().items():
            if name.startswith("bert."):
                assert torch.equal(tensor, expected[name]), name
        assert model.classifier.weight.shape == (2, 64) and 0.01 < model.classifier.weight.std() < 0.03
        assert torch.equal(model.classifier.bias, torch.zeros(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say where all fits
        kind.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_an_encoder_of_another_size(tmp_path):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 64}
    fastbert.BertForSequenceClassification(fastbert.BertConfig(vocab_size=120, **sizes)).save_pretrained(tmp_path)
    kind = fastbert.BertForSequenceClassification
    for option in (False, "head"):
        with pytest.raises(ValueError, match=r"word_embeddings\.weight has shape \(120, 64\).* \(130, 64\)"):
            kind.from_pretrained(tmp_path, vocab_size=130, ignore_mismatched_sizes=option)
    with pytest.warns(UserWarning, match="word_embeddings"):
        model = kind.from_pretrained(tmp_path, vocab_size=130, ignore_mismatched_sizes=True, inference_only=True)
    assert model(torch.tensor([[2, 129, 3]])).logits.isfinite().all()
    with pytest.warns(UserWarning, match="output.LayerNorm.bias"):  # a layer's last parameter, which frees the others
        model = kind.from_pretrained(tmp_path, hidden_size=32, ignore_mismatched_sizes=True, inference_only=True)
    assert model(torch.tensor([[2, 119, 3]])).logits.isfinite().all()
    with pytest.raises(ValueError, match="ignore_mismatched_sizes is 'all'; it must be False, True or 'head'"):
        kind.from_pretrained(tmp_path, ignore_mismatched_sizes="all")
