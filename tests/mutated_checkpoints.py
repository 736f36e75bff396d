"""Mutated checkpoints: each loads right, or raises one ValueError or OSError that names a file.

    python tests/mutated_checkpoints.py 10000 [--seed 0] [--case 17]

A case follows from the seed and its number alone. It takes a small sound folder, changes one file of it and loads it.
Prints a line for each failure and, at the end, how many loaded and how many were refused; the exit code tells.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from mutations import mutate
from tiny_bert import VOCAB

import fastbert

SECONDS, MEMORY = 5.0, 1 << 30  # what a case may take, next to its files
SPACE = 8 << 30  # of addresses, past which an allocation fails: this machine is not to be brought down
SIZES = {
    "vocab_size": len(VOCAB) + 2,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
MODELS = ("BertModel", "BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification")
TEXTS = ["the cat sat on the mat.", "zebra", ""]
LABELS = {0: "no", 1: "yes", 2: "perhaps"}
SENTENCE_FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
SENTENCE_FILES += ("config_sentence_transformers.json", "2_Dense/config.json", "2_Dense/model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.txt",)


def make_folders(root: Path) -> list[Path]:
    """The sound folders: weights in one file or in shards, as safetensors and in both formats of torch's."""
    torch.manual_seed(0)
    config = fastbert.BertConfig(**SIZES, id2label=LABELS, label2id={label: i for i, label in LABELS.items()})
    model = fastbert.BertForPreTraining(config)
    tokenizer = fastbert.BertTokenizer(VOCAB, added_tokens=["<one>", "<two>"], model_max_length=32)
    folders = [root / name for name in ("safetensors", "shards", "zip", "legacy", "pickled-shards")]
    for folder in folders:
        shards = {"max_shard_size": "20KB"} if "shards" in folder.name else {}
        model.save_pretrained(folder, **shards)
        tokenizer.save_pretrained(folder)
        _write_sentence_files(folder)
        if folder.name in ("zip", "legacy"):
            state = safetensors.torch.load_file(folder / "model.safetensors")
            (folder / "model.safetensors").unlink()
            zipped = folder.name == "zip"
            torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
            (folder / "tokenizer.json").unlink()
            added = {"<one>": len(VOCAB), "<two>": len(VOCAB) + 1}
            (folder / "added_tokens.json").write_text(json.dumps(added))
    _pickle_shards(folders[-1])
    return folders


def _write_sentence_files(folder: Path) -> None:
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir()
    (folder / "2_Dense").mkdir()
    dense = {"linear.weight": torch.eye(8, 32), "linear.bias": torch.ones(8)}
    safetensors.torch.save_file(dense, folder / "2_Dense" / "model.safetensors")
    activation = "torch.nn.modules.activation.Tanh"
    for name, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}),
        ("2_Dense/config.json", {"in_features": 32, "out_features": 8, "activation_function": activation}),
        ("sentence_bert_config.json", {"max_seq_length": 30, "do_lower_case": False}),
        ("config_sentence_transformers.json", {"prompts": {"query": "a "}, "default_prompt_name": None}),
    ):
        (folder / name).write_text(json.dumps(content))


def _pickle_shards(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model.safetensors.index.json").unlink()
    names = {shard: shard.replace("model-", "pytorch_model-")[: -len("safetensors")] + "bin" for shard in
             set(index["weight_map"].values())}  # fmt: skip
    for old, new in names.items():
        torch.save(safetensors.torch.load_file(folder / old), folder / new)
        (folder / old).unlink()
    index["weight_map"] = {name: names[shard] for name, shard in index["weight_map"].items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def files_of(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def loaders_of(name: str, rng: random.Random) -> list[tuple[str, Callable[[Path], object]]]:
    """What reads the file called `name`, by its own name."""
    model = rng.choice(MODELS)
    of_model = (model, lambda folder: check_model(getattr(fastbert, model).from_pretrained(folder), folder))
    of_tokenizer = ("BertTokenizer", lambda folder: check_tokenizer(fastbert.BertTokenizer.from_pretrained(folder)))
    embedder = ("Embedder", lambda folder: check_embedder(fastbert.Embedder.from_pretrained(folder)))
    if name in SENTENCE_FILES:
        return [embedder]
    own = of_tokenizer if name in TOKENIZER_FILES else of_model
    return [own, embedder] if rng.random() < 0.4 else [own]


class WrongLoadError(Exception):
    """A checkpoint was loaded as something that it does not hold."""


def check_model(model: fastbert.BertModel, folder: Path) -> None:
    """Sizes are those of config.json, and each parameter is, bit for bit, what another reader finds."""
    config = json.loads((folder / "config.json").read_bytes())
    for name, value in config.items():
        known = name in SIZES or name.endswith(("_prob", "_eps", "_range"))
        if known and hasattr(model.config, name) and getattr(model.config, name) != value:
            raise WrongLoadError(f"{name} is {getattr(model.config, name)}, in config.json {value!r}")
    state = read_independently(folder)
    stored = {re.sub(r"^bert\.", "", name): tensor for name, tensor in state.items() if isinstance(name, str)}
    words, decoder = "embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    if words not in stored and decoder in stored and model.config.tie_word_embeddings:
        stored[words] = stored[decoder]
    for name, parameter in model.named_parameters():
        plain = re.sub(r"^bert\.", "", name)
        names = [plain, plain.replace("predictions.bias", "predictions.decoder.bias")]
        found = [stored[n].to(parameter.dtype).contiguous() for n in names if n in stored]
        if found and not any(same_bits(tensor, parameter.data) for tensor in found):
            raise WrongLoadError(f"{name} is not what the file holds")
        if not found and plain.startswith(("embeddings.", "encoder.")):
            raise WrongLoadError(f"{name} is in no file")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def read_independently(folder: Path) -> dict[str, torch.Tensor]:
    for whole, read in (("model.safetensors", safetensors.torch.load_file), ("pytorch_model.bin", _read_pickled)):
        if (folder / whole).is_file():
            return read(folder / whole)
        if (folder / f"{whole}.index.json").is_file():
            shards = json.loads((folder / f"{whole}.index.json").read_bytes())["weight_map"]
            return {name: t for shard in set(shards.values()) for name, t in read(folder / shard).items()}
    raise WrongLoadError("there is no file of weights")


def _read_pickled(file: Path) -> dict[str, torch.Tensor]:
    state = torch.load(file, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def check_tokenizer(tokenizer: fastbert.BertTokenizer) -> None:
    ids = tokenizer(TEXTS)["input_ids"]
    vocab = set(tokenizer.get_vocab().values())
    if not all(index in vocab for row in ids for index in row):
        raise WrongLoadError(f"ids outside the vocabulary: {ids}")


def check_embedder(embedder: fastbert.Embedder) -> None:
    """A vector for each text; a vocabulary beyond the model's is an error of the call, which names the id."""
    try:
        vectors = embedder.embed(TEXTS)
    except ValueError:
        if max(embedder.tokenizer.get_vocab().values()) < embedder.model.config.vocab_size:
            raise
        return
    if vectors.shape != (len(TEXTS), embedder.width):
        raise WrongLoadError(f"vectors of shape {vectors.shape}")


def run_case(number: int, seed: int, folders: list[Path], scratch: Path) -> tuple[str, list[str]]:
    """A description of the case, and what each loader made of it: loaded, refused, or a failure in words."""
    rng = random.Random(f"{seed} {number}")
    source = rng.choice(folders)
    folder = scratch / "case"
    shutil.copytree(source, folder, copy_function=os.link)  # a mutation replaces files and writes into none
    names = files_of(folder)
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    name = rng.choice(weights) if rng.random() < 0.3 else rng.choice(names)
    try:
        what = mutate(folder / name, rng)
        return f"{source.name}: {name}: {what}", [
            f"{loader}: {outcome_of(load, folder, names)}" for loader, load in loaders_of(name, rng)
        ]
    finally:
        shutil.rmtree(folder)
        for left in scratch.iterdir():
            left.unlink()


def outcome_of(load: Callable[[Path], object], folder: Path, names: list[str]) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    before, begin = memory("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    signal.alarm(60)
    try:
        load(folder)
        outcome = "loaded"
    except (ValueError, OSError) as error:
        known = {*names, *(Path(name).name for name in names), "vocab.txt", "model.safetensors"}
        outcome = "refused"
        if not any(name in str(error) for name in known):
            outcome = f"FAILED, no file is named: {type(error).__name__}: {error}"
    except BaseException as error:
        outcome = f"FAILED: {type(error).__name__}: {str(error)[:300]}"
    signal.alarm(0)
    seconds, more = time.perf_counter() - begin, memory("VmHWM") - before
    if seconds > SECONDS or more > size + MEMORY:
        outcome = f"FAILED: {outcome} after {seconds:.1f} s, with {more >> 20} MB"
    return outcome


def memory(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError("60 s are over")  # an OSError, but no file is named


def run(cases: range, seed: int) -> tuple[Counter, list[str]]:
    """How many loads ended how, and a line for each failure."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _too_long)
    counts, failures = Counter(), []
    with tempfile.TemporaryDirectory() as directory:
        folders = make_folders(Path(directory) / "sound")
        scratch = Path(directory) / "scratch"
        scratch.mkdir()
        for folder in folders:  # each is sound as it stands
            for name in files_of(folder):
                for loader, load in loaders_of(name, random.Random(0)):
                    assert outcome_of(load, folder, [name]) == "loaded", (folder.name, loader)
        space = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + SPACE, space[1]))
        for number in cases:
            what, outcomes = run_case(number, seed, folders, scratch)
            for outcome in outcomes:
                counts["FAILED" if "FAILED" in outcome else outcome.rpartition(" ")[2]] += 1
                if "FAILED" in outcome:
                    failures.append(f"case {number}: {what}: {outcome}")
                    print(failures[-1], flush=True)
        resource.setrlimit(resource.RLIMIT_AS, space)
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone")
    args = parser.parse_args()
    cases = range(args.count) if args.case is None else range(args.case, args.case + 1)
    counts, failures = run(cases, args.seed)
    print(f"{len(cases)} cases: {dict(counts)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
