"""Each field of a sentence-transformers folder is honoured or refused: one error naming file, field, value, limit."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from tiny_bert import save_tiny

from fastbert.checkpoint.hub import resolve_folder
from fastbert.inference import Embedder
from fastbert.inference import sentence_settings as settings

huggingface_hub = pytest.importorskip("huggingface_hub")

WIDTH = 48
FILES = {
    "sentence_bert_config.json": {"max_seq_length": 30},
    "config_sentence_transformers.json": {"prompts": {"query": "a "}},
    "1_Pooling/config.json": {"word_embedding_dimension": WIDTH},
    "2_Dense/config.json": {"in_features": WIDTH, "out_features": 5},
    "3_LayerNorm/config.json": {"dimension": 5},
    "4_Dropout/config.json": {"dropout": 0.1},
    "5_Normalize/config.json": {},
}
WEIGHTS = {
    "2_Dense": {"linear.weight": torch.zeros(5, WIDTH), "linear.bias": torch.zeros(5)},
    "3_LayerNorm": {"norm.weight": torch.zeros(5), "norm.bias": torch.zeros(5)},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("whole"), num_hidden_layers=1)
    paths = ["", *dict.fromkeys(name.partition("/")[0] for name in FILES if "/" in name)]
    for path in paths[1:]:
        (folder / path).mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(json.dumps(content))
    for path, tensors in WEIGHTS.items():
        torch.save(tensors, folder / path / "pytorch_model.bin")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}"}
        for i, path in enumerate(paths)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


@pytest.fixture
def load(whole):
    """Loads the folder with one file replaced; all is put back."""
    before = {}

    def load(name, content, **options):
        file = whole / name
        before.setdefault(file, file.read_bytes())
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif name.endswith(".json"):
            file.write_text(json.dumps(content))
        else:
            torch.save(content, file)
        return Embedder.from_pretrained(whole, **options)

    yield load
    for file, content in before.items():
        file.write_bytes(content)


def refuses(load, name, content, *parts, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as caught:
            load(name, content, **options)
    message = str(caught.value)
    assert str(name) in message and "\n" not in message
    for part in parts:
        assert part in message, message


def test_the_folder_as_it_is(whole):
    embedder = Embedder.from_pretrained(whole)
    assert (embedder.width, embedder.normalize, embedder.max_length, embedder.prompts["query"]) == (5, True, 30, "a ")


KINDS = [None, 0, 1, -1, 2**24 + 1, 1.5, "1", "", True, [], ["a"], [3], {}, {"a": 1}]
# What is right of KINDS for each field, in addition to what FILES have. 0 and 1 are no flags, True is no number.
RIGHT = {
    "sentence_bert_config.json": {
        **{key: [None, 1] for key in ("max_seq_length", "query_length", "document_length")},
        **{key: [None, True] for key in ("do_lower_case", "unpad_inputs")},
        **{key: [None, {}] for key in ("processing_kwargs", "query_expansion")},
        "tokenizer_name_or_path": [None],
        **{key: [] for key in ("transformer_task", "modality_config", "module_output_name", "backend")},
        **{key: [{}] for key in ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs")},
        **{key: [{}] for key in ("config_args", "config_kwargs")},
    },
    "config_sentence_transformers.json": {
        "__version__": [{}, {"a": 1}],
        "default_prompt_name": [None],
        "model_type": [],
        "prompts": [{}],
        "similarity_fn_name": [None, "1", ""],
        "requirements": [None, {}, {"a": 1}],
        "truncate_dim": [None, 1],
    },
    "1_Pooling/config.json": {
        **{key: [1] for key in ("embedding_dimension", "word_embedding_dimension")},
        "pooling_mode": [],
        **{key: [True] for key in ("include_prompt", *settings._SWITCHES)},
    },
    "2_Dense/config.json": {
        **{key: [1] for key in ("in_features", "out_features")},
        **{key: [] for key in ("activation_function", "module_input_name")},
        **{key: [True] for key in ("bias", "use_residual")},
        "module_output_name": [None],
    },
    "3_LayerNorm/config.json": {"dimension": [1]},
    "4_Dropout/config.json": {"dropout": [0, 1]},
    "5_Normalize/config.json": {"module_input_name": [], "module_output_name": [None]},
}


def same(a, b):
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", RIGHT)
def test_each_field_by_the_kind_of_its_value(whole, load, name, monkeypatch):
    """Reading alone: no model is loaded for the 600 values."""
    monkeypatch.setattr("fastbert.inference.embed.AutoModel", Stop)
    for field, right in RIGHT[name].items():
        for value in KINDS:
            content = FILES[name] | {field: value}
            if any(same(value, known) for known in right):
                # The weights, which are read first, have another shape.
                refused = field in ("in_features", "out_features", "dimension", "use_residual")
                with pytest.raises(ValueError, match=r"tensor .*config\.json") if refused else pytest.raises(Stopped):
                    load(name, content)
            elif field == "truncate_dim":  # its limit is the model's width
                continue
            else:
                refuses(load, name, content, f": {field} is ", "; it must be ")


class Stopped(Exception):
    pass


class Stop:
    @staticmethod
    def of(config):
        raise Stopped


def test_the_table_above_has_each_field():
    tables = {
        "sentence_bert_config.json": settings._TRANSFORMER,
        "config_sentence_transformers.json": {**settings._MODEL, "truncate_dim": 0},
        "1_Pooling/config.json": settings._POOLING,
        "2_Dense/config.json": settings._DENSE,
        "5_Normalize/config.json": settings._FEATURES,
    }
    assert {name: set(table) for name, table in tables.items()} == {name: set(RIGHT[name]) for name in tables}


@pytest.mark.parametrize("name", ["sentence_bert_config.json", *(name for name in FILES if "/" in name)])
def test_unknown_fields_are_refused_by_name(load, name):
    refuses(load, name, FILES[name] | {"sharpness": 2}, "does not know the field 'sharpness'")


def test_fields_of_no_consequence(load):
    assert load("config_sentence_transformers.json", {"of our own": [1], "__version__": {}}).width == 5
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    written = {"transformer_task": "feature-extraction", "modality_config": {"text": text}}
    written |= {"module_output_name": "token_embeddings", "model_args": {"attn_implementation": "eager"}}
    assert load("sentence_bert_config.json", written).max_length == 40


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("sentence_bert_config.json", {"do_lower_case": 1}, ["do_lower_case is 1; it must be null or true or false"]),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, ["transformer_task is 'fill-mask'"]),
        ("sentence_bert_config.json", {"model_args": {"dtype": "float16"}}, ["model_args is {'dtype': 'float16'}"]),
        ("config_sentence_transformers.json", {"prompts": []}, ["prompts is []; it must be an object of strings"]),
        ("config_sentence_transformers.json", {"prompts": {"q": 1}}, ["prompts is {'q': 1}"]),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, ["model_type is 'SparseEncoder'"]),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, ["default_prompt_name is 'q'"]),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, ["pooling_mode is 'median'", "one of cls, max, mean"]),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "median"]}, ["pooling_mode is ['mean', 'median']"]),
        ("1_Pooling/config.json", {"word_embedding_dimension": 47}, ["dimension is 47; the token states have 48"]),
        ("2_Dense/config.json", {"in_features": WIDTH}, ["out_features is None"]),
        ("2_Dense/config.json", {"in_features": 47, "out_features": 5}, ["linear.weight has shape (5, 48)", "(5, 47)"]),
        ("2_Dense/config.json", {**FILES["2_Dense/config.json"], "bias": False}, ["linear.bias is none of linear.w"]),
        ("3_LayerNorm/config.json", {}, ["dimension is None"]),
        ("3_LayerNorm/config.json", {"dimension": 4}, ["norm.weight has shape (5,)", "makes it (4,)"]),
        ("4_Dropout/config.json", {"dropout": float("nan")}, ["dropout is nan"]),
    ],
)
def test_values(load, name, content, parts):
    refuses(load, name, content, *parts)


@pytest.mark.parametrize(
    "activation",
    [
        *("torch.nn.modules.activation.MultiheadAttention", "torch.nn.modules.activation.Softmax", "torch.nn.Linear"),
        *(
            "torch.nn.functional.gelu",
            "Tanh",
            "torch.nn.Tanh()",
            "transformers.activations.GELUActivation",
            "os.system",
        ),
    ],
)
def test_activations_that_are_not_known(load, activation):
    content = FILES["2_Dense/config.json"] | {"activation_function": activation}
    refuses(load, "2_Dense/config.json", content, f"activation_function is {activation!r}", "with a NAME of CELU, ELU")


def test_features_that_no_module_makes(load):
    dense = FILES["2_Dense/config.json"]
    for name, content in (("5_Normalize/config.json", {}), ("2_Dense/config.json", dense)):
        refuses(load, name, content | {"module_input_name": "all_layer_embeddings"}, "module_input_name is 'all_layer")
        content = content | {"module_input_name": "token_embeddings", "module_output_name": "sentence_embedding"}
        refuses(load, name, content, "module_output_name is 'sentence_embedding'; it must be 'token_embeddings'")
        load(name, FILES[name])


def test_weights_of_modules(load):
    sound = WEIGHTS["2_Dense"]
    name = "2_Dense/pytorch_model.bin"
    refuses(load, name, {"linear.bias": sound["linear.bias"]}, "no tensor linear.weight", "2_Dense/config.json asks")
    refuses(load, name, sound | {"linear.scale": torch.ones(1)}, "linear.scale is none of linear.weight, linear.bias")
    refuses(load, name, sound | {"linear.bias": torch.ones(5, dtype=torch.int64)}, "has dtype torch.int64")
    refuses(load, name, b"no checkpoint", "is truncated or no checkpoint")
    assert (
        load(name, {key: tensor.half() for key, tensor in sound.items()}).modules[0].tensors["linear.weight"].dtype
        == torch.float32
    )


def module(kind, path="1_Pooling", **fields):
    return {"type": f"sentence_transformers.models.{kind}", "path": path, **fields}


T, P = module("Transformer", ""), module("Pooling")
MODULES = [
    ([], ["the first module's type is None"]),
    ([P, T], ["the first module's type is 'sentence_transformers.models.Pooling'"]),
    ([module("Transformer", "") | {"type": "custom_st.Transformer"}, P], ["type is 'custom_st.Transformer'"]),
    ([T, T, P], ["holds a 'Transformer' module, which fastbert does not run"]),
    ([T], ["the list of modules is 'without Pooling'; it must be with one, or give pooling"]),
    ([T, P, P], ["holds two Pooling modules"]),
    (
        [T, module("LSTM"), P],
        ["holds a 'LSTM' module, which fastbert does not run; it runs Transformer, Pool"],
    ),
    ([T, module("WeightedLayerPooling"), P], ["holds a 'WeightedLayerPooling' module"]),
    ([T, P | {"type": "pylate.models.Dense.Dense"}], ["holds a 'pylate.models.Dense.Dense' module"]),
    ([T, module("Dense", "2_Dense"), P], ["holds a Dense module of sentence_embedding before its Pooling module"]),
    ([T, module("LayerNorm", "3_LayerNorm"), P], ["holds a LayerNorm module of sentence_embedding before"]),
    ([T, P | {"name": 3}], ["name is 3; it must be a string"]),
    ([T | {"name": "0"}, P | {"name": "0"}], ["the list of names is ['0', '0']; it must be without a name"]),
    ([T, P | {"idx": "1"}], ["idx is '1'; it must be an integer"]),
    ([T, P | {"path": ["1_Pooling"]}], ["path is ['1_Pooling']; it must be a string"]),
    ([T, P | {"kwargs": "task"}], ["kwargs is 'task'; it must be a list of strings"]),
    ([T, P | {"revision": "main"}], ["does not know the field 'revision'"]),
    ([T, {"path": "1_Pooling"}], ["a module is {'path': '1_Pooling'}"]),
    ([T, module("Pooling", "")], ["names '/config.json'; it must lie in the folder of modules.json"]),
]


@pytest.mark.parametrize(("modules", "parts"), MODULES, ids=range(len(MODULES)))
def test_modules(load, modules, parts):
    refuses(load, "modules.json", modules, *parts)


def test_what_follows_the_transformer_is_not_read_where_pooling_and_normalize_are_given(load):
    modules = [T, module("LSTM"), P]
    refuses(load, "modules.json", modules, "give both pooling and normalize", pooling="cls")
    refuses(load, "modules.json", modules, "give both pooling and normalize", normalize=True)
    embedder = load("modules.json", modules, pooling="cls", normalize=True)
    assert (embedder.pooling, embedder.width, embedder.max_length) == ("cls", WIDTH, 30)
    assert load("modules.json", [T, module("Normalize", "")], pooling="max").normalize


def test_a_folder_within_a_hub_model(whole, monkeypatch, tmp_path):
    """What is asked of the hub: a model's files, and the older weights only where there are no newer ones."""
    calls = []

    def snapshot_download(model_id, *, revision, allow_patterns):
        calls.append((model_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    index = tmp_path / "modules.json"
    with pytest.raises(FileNotFoundError, match=r"modules\.json: no folder '0_BERT' in 'org/name'"):
        resolve_folder("org/name", "0_BERT", revision="v1", named_by=index)
    (tmp_path / "0_BERT").mkdir()
    calls.clear()
    assert resolve_folder("org/name", "0_BERT", revision="v1", named_by=index) == tmp_path / "0_BERT"
    files = [["0_BERT/*.json", "0_BERT/vocab.txt", f"0_BERT/{w}"] for w in ("model*.safetensors", "pytorch_model*.bin")]
    assert calls == [("org/name", "v1", patterns) for patterns in files]
    (tmp_path / "0_BERT" / "model.safetensors").touch()
    calls.clear()
    resolve_folder("org/name", "0_BERT", named_by=index)
    assert calls == [("org/name", None, files[0])]
    for name in ("../x", "/x", "a/../b", ""):
        with pytest.raises(ValueError, match=re.escape(f"{index} names {name!r}; it must lie in")):
            resolve_folder("org/name", name, named_by=index)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("gone\nx")))
    with pytest.raises(OSError, match=r"^cannot get '0_BERT' of the hub model 'org/name' at revision 'v1': gone$"):
        resolve_folder("org/name", "0_BERT", revision="v1", named_by=Path("modules.json"))
