"""The arguments of predict, zero-shot, search, rerank, mine and summarize, in a module that does not import torch."""

from __future__ import annotations

import argparse

from fastbert.cli.finetune_arguments import COLUMNS, add_csv_arguments, names, positive

_READ = ("text", "pair", "words", "question", "context")  # columns
PREDICT_EXAMPLES = """\
examples:
  fastbert predict path/to/model reviews.csv --text-column review -o predicted.csv
  fastbert predict path/to/model messages.jsonl -o predicted.parquet --top-k 3 --resume
  zcat mail.txt.gz | fastbert predict path/to/model - --threshold 0.9 | head -1

A row of the output has all columns of the input, its line (but for inputs with such a column), and the new ones:
  classification        prediction, prediction_score; --top-k adds prediction_top
  several labels        prediction, prediction_scores: those of at least --threshold (default: 0.5)
  regression            prediction
  token-classification  prediction: a list of {entity_group, score, word, start, end}
  question-answering    prediction, prediction_score, prediction_start, prediction_end
  multiple-choice       prediction: the choice's number from 0; prediction_score, prediction_scores
  all                   prediction_windows, prediction_tokens: a text that is too long runs in overlapping windows

Until it is complete, OUT.partial and OUT.journal.json are next to it; after Ctrl-C, a kill or a crash, the same
command with --resume continues.
"""
ZERO_SHOT_EXAMPLES = """\
examples:
  fastbert zero-shot path/to/nli-model mail.txt --labels urgent,invoice,spam -o sorted.csv
  echo "the printer is on fire" | fastbert zero-shot path/to/nli-model - --labels urgent,later --multi-label
"""
SEARCH_EXAMPLES = """\
examples:
  fastbert embed path/to/model texts.txt -o texts.npy
  fastbert search path/to/model "how to fly" --corpus texts.npy --texts texts.txt --top-k 3
  fastbert search path/to/model --queries queries.txt --corpus texts.npy --prompt-name query
"""
RERANK_EXAMPLES = """\
example:
  fastbert rerank path/to/cross-encoder "how to fly" documents.txt --top-k 3
"""
MINE_EXAMPLES = """\
examples:
  fastbert mine path/to/model texts.txt pairs.jsonl -o triplets.jsonl --range-min 10 --relative-margin 0.05
  fastbert mine path/to/model texts.txt pairs.csv -o graded.jsonl --cross-encoder path/to/cross-encoder \\
      --output-format labeled-pair --output-scores

A negative is a text of CORPUS that is close to a query and none of its positives. OUT is what finetune reads, by
--task embedding or rerank.
"""
SUMMARIZE_EXAMPLES = """\
examples:
  fastbert summarize path/to/model article.txt --ratio 0.1
  fastbert summarize path/to/model a.txt b.txt --sentences 3
"""


EXPLAIN_EXAMPLES = """\
examples:
  fastbert explain-text path/to/model "a joy from start to end" --html why.html
  fastbert explain-text path/to/model "a joy" --target negative --method occlusion
"""


def add_predict_arguments(parser: argparse.ArgumentParser, *, zero_shot: bool = False) -> None:
    parser.add_argument("inputs", metavar="INPUT", nargs="*", default=["-"], help="files; - is stdin (default)")
    if zero_shot:
        parser.add_argument("--labels", required=True, metavar="A,B,...", help="to choose from")
        parser.add_argument("--template", metavar="TEXT", help='a sentence with {} (default: "This example is {}.")')
        parser.add_argument("--multi-label", action="store_true", help="several labels may be right")
    parser.set_defaults(task="zero-shot-classification" if zero_shot else None)

    reading = parser.add_argument_group("input", "columns are names, in csv also numbers from 1; in JSON, keys")
    reading.add_argument(
        "--input-format",
        dest="format",
        choices=("auto", "text", "jsonl", "json", "csv", "parquet", *(() if zero_shot else ("conll", "squad"))),
        default="auto",
        help="auto goes by the suffix; stdin is text, one a line",
    )
    for name in _READ[:1] if zero_shot else _READ:
        reading.add_argument(f"--{name}-column", dest=name, metavar="NAME", help=COLUMNS[name])
    if not zero_shot:
        choices = "a column each, or one of lists (default: choices)"
        reading.add_argument("--choice-columns", dest="choices", type=names, metavar="A,B,...", help=choices)
    reading.add_argument("--allow-empty", action="store_true", help="predict for empty texts; else they are bad lines")
    reading.add_argument(
        "--bad-lines",
        choices=("fail", "skip"),
        default="fail",
        help="a line that is not UTF-8, not JSON, without a column, empty: end the run (default) or skip it",
    )
    add_csv_arguments(reading)

    answers = parser.add_argument_group("predictions")
    answers.add_argument("--top-k", metavar="K", type=positive, help="also the K best, with their scores")
    answers.add_argument("--threshold", metavar="P", type=float, help="least probability of what is predicted")
    answers.add_argument("--max-length", metavar="N", type=positive, help="tokens of a window (default: the model's)")
    answers.add_argument("--stride", metavar="N", type=int, help="tokens that two windows share (default: 128)")
    answers.add_argument("--truncation", action="store_true", help="cut long texts instead of windows")
    answers.add_argument(
        "--max-tokens", metavar="N", type=positive, help="most tokens that go through the model together"
    )
    answers.add_argument("--window", metavar="N", type=positive, help="rows that are kept together (default: 2048)")
    if zero_shot:
        parser.set_defaults(long=None)
    else:
        long = "of the windows' logits, to classify a long text (default: mean)"
        answers.add_argument("--long", choices=("mean", "max"), help=long)
        answers.add_argument("--max-answer", metavar="N", type=positive, help="tokens of an answer (default: 15)")
        answers.add_argument("--unanswerable", action="store_true", help="a question may have no answer")

    writing = parser.add_argument_group("output")
    writing.add_argument("-o", "--output", metavar="OUT", default="-", help="a file; - is stdout (default)")
    writing.add_argument(
        "--output-format",
        choices=("jsonl", "csv", "parquet"),
        help="(default: by OUT's suffix; stdout is jsonl)",
    )
    writing.add_argument("--prefix", default="prediction", help="of the new columns' names (default: prediction)")
    add_restart(writing, "an interrupted run away")


def add_restart(group: argparse._ArgumentGroup, what: str) -> None:
    again = group.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an interrupted run, if there is one")
    again.add_argument("--restart", action="store_true", help=f"throw {what}")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress line, no summary")


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("queries", metavar="QUERY", nargs="*", help="texts to search for")
    parser.add_argument("--queries", dest="query_file", metavar="FILE", help="a file of them, one a line")
    parser.add_argument("--corpus", metavar="NPY", required=True, help="vectors, as fastbert embed writes them")
    parser.add_argument("--texts", metavar="FILE", help="the texts of the vectors, to be shown")
    parser.add_argument("--field", default="text", help="of a JSON object of --texts, the text (default: text)")
    parser.add_argument("--column", default="text", help="of a csv or parquet file of --texts (default: text)")
    parser.add_argument("--top-k", type=positive, default=10, help="hits for each query (default: 10)")
    scores = ("cos_sim", "dot_score", "euclidean", "manhattan")
    parser.add_argument("--score", choices=scores, default="cos_sim", help="(default: cos_sim)")
    parser.add_argument("--index", choices=("exact", "faiss"), default="exact", help="(default: exact)")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="put before each query; '' for none")
    prompts.add_argument("--prompt-name", metavar="NAME", help="the model's prompt of that name: query, say")


def add_mine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", metavar="CORPUS", help="a file of texts to choose from: a line each, or a column")
    parser.add_argument("queries", metavar="QUERIES", help="a file of pairs: csv, jsonl, json or parquet")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="a .jsonl file of rows to train on")
    reading = parser.add_argument_group("input")
    reading.add_argument("--field", default="text", help="of a JSON object of CORPUS, the text (default: text)")
    reading.add_argument("--column", default="text", help="of a csv or parquet CORPUS, the text (default: text)")
    for name in ("anchor", "positive"):
        told = f"of QUERIES (default: {name})"
        reading.add_argument(f"--{name}-column", dest=name, metavar="NAME", default=name, help=told)
    prompts = parser.add_argument_group("prompts", "defaults are the model's for queries and documents")
    prompts.add_argument("--query-prompt", metavar="TEXT", help="put before each query; '' for none")
    prompts.add_argument("--corpus-prompt", metavar="TEXT", help="put before each text; '' for none")
    choice = parser.add_argument_group("negatives")
    choice.add_argument("--num-negatives", type=positive, metavar="N", help="for each query (default: 3)")
    choice.add_argument("--range-min", type=int, metavar="N", help="leave the N closest out (default: 0)")
    choice.add_argument("--range-max", type=positive, metavar="N", help="look at the N closest (default: as needed)")
    choice.add_argument("--max-score", type=float, metavar="X", help="of a negative")
    choice.add_argument("--min-score", type=float, metavar="X", help="of a negative")
    choice.add_argument("--absolute-margin", type=float, metavar="X", help="least distance from the positive's score")
    choice.add_argument("--relative-margin", type=float, metavar="X", help="the same, as a share of that score")
    choice.add_argument("--sampling-strategy", choices=("top", "random"), help="(default: top)")
    choice.add_argument("--seed", type=int, help="of random negatives (default: 0)")
    choice.add_argument("--index", choices=("exact", "faiss"), help="(default: exact)")
    choice.add_argument("--cross-encoder", metavar="MODEL", help="a reranker whose scores count in place of cosines")
    formats = ("triplet", "n-tuple", "labeled-pair", "labeled-list")
    choice.add_argument("--output-format", choices=formats, default="triplet", help="of a row (default: triplet)")
    choice.add_argument("--output-scores", action="store_true", help="write scores, too, or in place of labels")


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--pair", metavar="TEXT", help="the second text of a pair")
    parser.add_argument("--target", metavar="CLASS", help="its name or number (default: the one predicted)")
    methods = ("integrated_gradients", "occlusion")
    parser.add_argument("--method", choices=methods, default=methods[0], help=f"(default: {methods[0]})")
    parser.add_argument("--steps", type=positive, default=50, help="of integrated gradients (default: 50)")
    parser.add_argument("--html", metavar="FILE", help="write a page with text, attention and nearest tokens")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_rerank_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("query", metavar="QUERY")
    parser.add_argument("documents", metavar="FILE", help="documents: a line each, or a column text; - is stdin")
    parser.add_argument("--top-k", type=positive, help="only the best (default: all)")


def add_summarize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", metavar="FILE", nargs="*", default=["-"], help="text files; - is stdin (default)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--ratio", type=float, help="share of the sentences (default: 0.2)")
    length.add_argument("--sentences", type=positive, metavar="N", help="number of sentences")
    parser.add_argument("--min-length", type=positive, metavar="N", help="characters of a sentence (default: 40)")
