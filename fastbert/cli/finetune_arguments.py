"""The arguments of `fastbert finetune`, in a module that does not import torch."""

from __future__ import annotations

import argparse
import types
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastbert.training.finetune.settings import SPARSE_OPTIONS, TEXT_OPTIONS, VECTOR_OPTIONS, FinetuneSettings

DISTILLED_TASKS = (
    "classification",
    "multi-label",
    "regression",
    "token-classification",
    "question-answering",
    "multiple-choice",
)
FINETUNE_TASKS = (*DISTILLED_TASKS, "embedding", "sparse-embedding", "rerank")
COLUMNS = {
    "text": "(default: text)",
    "pair": "the second text of a pair",
    "label": "class, number or classes (default: label)",
    "words": "a list; in CoNLL, a number from 1 (default: words)",
    "tags": "a list; in CoNLL, a number from 1 (default: tags)",
    "question": "(default: question)",
    "context": "(default: context)",
    "answers": "(default: answers)",
    "anchor": "the text, or query, of a pair or triplet (default: anchor)",
    "positive": "what belongs to it (default: positive)",
    "query": "of rerank (default: query)",
    "document": "of rerank, a text or a list (default: document)",
}
FINETUNE_EXAMPLES = """\
examples:
  fastbert finetune --task classification --model path/to/model --train train.csv --dev dev.csv -o out
  fastbert finetune --task classification --model path/to/model --train all.csv --try lr=2e-5,5e-5 seed=1,2 -o out
  fastbert finetune --task regression --model path/to/model --train pairs.tsv --dev dev.tsv --text-column first \\
      --pair-column second --label-column score -o out
  fastbert finetune --task token-classification --model path/to/model --train train.conll --dev dev.conll -o out
  fastbert finetune --task question-answering --model path/to/model --train squad.json --dev dev.json -o out
  fastbert finetune --task embedding --model path/to/model --train pairs.jsonl --batch-size 256 -o out
  fastbert finetune --task rerank --model path/to/model --train triplets.jsonl --loss lambda -o out

DIR holds a model that transformers loads, and report/: metrics.json, learning-curves.png, predictions-dev.jsonl
and, for classification, a confusion matrix. Scores are shares (0 to 1). docs/recipes.md has whole recipes.
"""


EVALUATE_EXAMPLES = """\
examples:
  fastbert evaluate out --test test.csv
  fastbert evaluate out --test test.csv --text-column first --pair-column second -o report

Prints the scores that finetune reports; DIR gets metrics.json, predictions-test.jsonl and, for classification, a
confusion matrix. The task is that of the model's head.
"""


def add_finetune_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to the parser; omitted ones have the defaults of FinetuneSettings or Reading."""
    parser.add_argument("--task", choices=FINETUNE_TASKS, required=True)
    parser.add_argument("--model", metavar="MODEL", required=True, help="a folder in Hugging Face layout, or a hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_task_arguments(parser, required=True)
    several = parser.add_argument_group("several runs", "the best by its dev score is kept; a table says what each had")
    several.add_argument("--folds", metavar="K", type=positive, help="train K models, each tested on its part of FILE")
    several.add_argument(
        "--try",
        dest="tries",
        metavar="SETTING=A,B",
        nargs="+",
        type=values_to_try,
        help="train with each combination of these values: lr=2e-5,5e-5 seed=1,2",
    )


def add_task_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds the arguments of training for a task, except the models; `required`: whether the parser requires a task."""
    parser.add_argument("--train", metavar="FILE", required=required, help="examples to learn from")
    dev = parser.add_mutually_exclusive_group()
    dev.add_argument(
        "--dev", metavar="FILE", help="examples to choose the best checkpoint by (default: some of --train)"
    )
    dev.add_argument("--dev-share", metavar="SHARE", type=float, help="of --train, without --dev (default: 0.1)")
    parser.add_argument("--test", metavar="FILE", help="examples for the report")
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=required, help="the model, and its report in DIR/report"
    )
    parser.add_argument("--resume", action="store_true", help="continue the newest checkpoint, if there is one")
    parser.add_argument("--device", help="cpu, cuda or cuda:1, say (default: cuda where there is one, else cpu)")

    add_columns(parser)
    vectors = (*VECTOR_OPTIONS, *SPARSE_OPTIONS)
    add_options(parser.add_argument_group("training"), FinetuneSettings, without=(*TEXT_OPTIONS, *vectors))
    add_options(parser.add_argument_group("texts"), FinetuneSettings, only=TEXT_OPTIONS)
    add_options(parser.add_argument_group("embedders and rerankers"), FinetuneSettings, only=vectors)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fastbert evaluate`, but for the model."""
    parser.add_argument("--test", metavar="FILE", required=True, help="labelled examples")
    parser.add_argument("-o", "--output", metavar="DIR", help="the report (default: only printed)")
    add_columns(parser)
    add_options(parser.add_argument_group("texts"), FinetuneSettings, only=TEXT_OPTIONS)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how labelled examples are read."""
    reading = parser.add_argument_group("input", "columns are names, in csv also numbers from 1; in jsonl, keys")
    reading.add_argument(
        "--format",
        choices=("auto", "csv", "jsonl", "json", "parquet", "conll", "squad"),
        help="(default: by the suffix)",
    )
    for name, help in COLUMNS.items():
        reading.add_argument(f"--{name}-column", dest=name, metavar="NAME", help=help)
    reading.add_argument("--label-separator", metavar="TEXT", help="between several classes (default: a comma)")
    negatives = "a column each, or one of lists (default: negative, and negative_1, negative_2 ...)"
    reading.add_argument("--negative-columns", dest="negatives", type=names, metavar="A,B,...", help=negatives)
    choices = "a column each, or one of lists (default: choices)"
    reading.add_argument("--choice-columns", dest="choices", type=names, metavar="A,B,...", help=choices)
    add_csv_arguments(reading)


def add_options(
    group: argparse._ArgumentGroup, kind: type, *, only: Sequence[str] = (), without: Sequence[str] = ()
) -> None:
    """Adds an option for each field of `kind` made by `option`; an omitted one is None, and keeps the default."""
    hints = get_type_hints(kind)
    for entry in fields(kind):
        told = entry.metadata
        if "help" not in told or entry.name in without or (only and entry.name not in only):
            continue
        hint, default, help = hints[entry.name], entry.default, told["help"]
        if isinstance(hint, types.UnionType):  # `X | None`
            hint = get_args(hint)[0]
        if hint is bool:
            action = "store_true" if default is False else argparse.BooleanOptionalAction
            how: dict[str, Any] = {"action": action, "default": None}
        elif get_origin(hint) is Literal:
            how = {"choices": get_args(hint)}
        elif get_origin(hint) is tuple:
            how = {"type": numbers if get_args(hint)[0] is int else names, "metavar": told["metavar"]}
        else:
            whole = positive if told.get("least", 0) > 0 else int
            how = {"type": whole if hint is int else hint, "metavar": told.get("metavar", "N" if hint is int else None)}
        if default is not None and hint is not bool:
            shown = ",".join(default) if isinstance(default, tuple) else f"{default:g}" if hint is float else default
            help = f"{help} (default: {shown})"
        spelling = told.get("spelling", f"--{entry.name.replace('_', '-')}")
        group.add_argument(spelling, dest=entry.name, help=help, **how)


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, as 0,2,4") from None


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def values_to_try(text: str) -> tuple[str, tuple[Any, ...]]:
    """A setting and its values, of `lr=2e-5,5e-5`; each value is read as the setting's own option reads it."""
    name, equals, listed = text.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    add_options(parser.add_argument_group(), FinetuneSettings)
    action = next((a for a in parser._actions if a.dest == name and a.nargs != 0), None)
    if action is None or not equals or not listed:
        raise argparse.ArgumentTypeError(f"{text!r} is not a setting with a value and its values, as lr=2e-5,5e-5")
    try:
        return name, tuple(
            getattr(parser.parse_args([action.option_strings[0], value]), name) for value in listed.split(",")
        )
    except argparse.ArgumentError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.message}") from None


def add_csv_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the options for csv files, common to all commands that read them."""
    group.add_argument(
        "--delimiter",
        type=lambda text: "\t" if text == "\\t" else text,
        help=r"between csv fields, '\t' for a tab (default: a comma, or a tab for .tsv)",
    )
    group.add_argument(
        "--no-header", dest="header", action="store_false", help="the csv file has no line of column names"
    )
    quoting = group.add_mutually_exclusive_group()
    quoting.add_argument(
        "--quoted",
        dest="quoted",
        action="store_const",
        const=True,
        help="csv fields may stand in double quotes (default: yes, but not in a .tsv)",
    )
    quoting.add_argument(
        "--unquoted", dest="quoted", action="store_const", const=False, help='" has no meaning in the csv file'
    )
