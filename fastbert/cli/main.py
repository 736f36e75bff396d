"""The command `fastbert`: embed, predict, search and the others; see build_parser.

Exit codes: 0 done; 1 failed, with one line on stderr; 2 wrong usage; 130 interrupted; 141 the output's pipe was
closed; 143 stopped by SIGTERM. torch and all that needs it are imported only by the commands that use them.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from fastbert.cli.distill_arguments import DISTILL_EXAMPLES, add_distill_arguments
from fastbert.cli.finetune_arguments import (
    EVALUATE_EXAMPLES,
    FINETUNE_EXAMPLES,
    add_csv_arguments,
    add_evaluate_arguments,
    add_finetune_arguments,
    positive,
)
from fastbert.cli.options import one_line
from fastbert.cli.serve_arguments import SERVE_EXAMPLES, add_serve_arguments
from fastbert.cli.task_arguments import (
    EXPLAIN_EXAMPLES,
    MINE_EXAMPLES,
    PREDICT_EXAMPLES,
    RERANK_EXAMPLES,
    SEARCH_EXAMPLES,
    SUMMARIZE_EXAMPLES,
    ZERO_SHOT_EXAMPLES,
    add_explain_arguments,
    add_mine_arguments,
    add_predict_arguments,
    add_rerank_arguments,
    add_restart,
    add_search_arguments,
    add_summarize_arguments,
)
from fastbert.lazy import needs_torch
from fastbert.precision import QUANTIZED, SPLIT

FAILED, INTERRUPTED, BROKEN_PIPE = 1, 130, 141
DTYPES = ("float32", "bfloat16", "float16")
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "pooler")

_EMBED_EXAMPLES = """\
examples:
  fastbert embed path/to/model sentences.txt -o vectors.npy
  fastbert embed path/to/model reviews.csv --column review -o vectors.parquet --bad-lines skip
  zcat big.jsonl.gz | fastbert embed path/to/model - --input-format jsonl --field body -o big.npy --resume
  fastbert embed path/to/model queries.txt --prompt-name query --truncate-dim 256 -o queries.npy
  fastbert embed path/to/model queries.txt | head -1

rows and lines:
  .npy        row i is record i (line i of a text or jsonl file); a skipped line is a row of NaN
  .parquet    columns line, embedding; and file, with several inputs. A skipped line has no row
  .jsonl      {"line": 1, "embedding": [...]}, and "file" with several inputs. A skipped line has no row

interruption:
  OUT appears when it is complete. Until then OUT.partial and OUT.journal.json are next to it; after Ctrl-C, a
  kill or a crash, the same command with --resume continues with the first window that was not finished. The
  lines done are read again, to make sure that they are the same.
"""
_FILL_MASK_EXAMPLES = """\
example:
  fastbert fill-mask path/to/model "Paris is the [MASK] of France." --top-k 3
"""
_PREPARE_EXAMPLES = """\
examples:
  fastbert prepare books/ wiki.txt -o data --learn-vocab 30522 --processes 8 --held-out 0.01
  fastbert prepare corpus.jsonl --field body -o data --vocab path/to/model --no-pairs --max-length 128
  fastbert prepare part-*.parquet --column text -o data --vocab vocab.txt --no-lower --resume

OUT is a folder: shards of examples for each split, the tokenizer, and index.json, which is written last. The same
inputs, options and seed make the same bytes, with any number of processes. After Ctrl-C, a kill or a crash, the
same command with --resume continues with the shards that were not finished.
"""
_PRETRAIN_EXAMPLES = """\
examples:
  fastbert pretrain config.toml
  fastbert pretrain config.toml --resume --set training.log_every=1
  torchrun --nproc-per-node 8 -m fastbert pretrain config.toml --resume

interruption:
  On SIGTERM and Ctrl-C the run ends with a checkpoint. After a kill or a crash, too, the same command with
  --resume continues from the newest checkpoint in output.folder, or begins where there is none.
"""
_DOCTOR_EXAMPLES = """\
example:
  fastbert doctor
  FASTBERT_BACKEND=reference fastbert doctor
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
        warnings.showwarning = _show_warning
        code = import_module(f"fastbert.{args.module}").run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("fastbert: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            error = needs_torch(args.parser.prog)
        print(f"fastbert: error: {one_line(error)}", file=sys.stderr)
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each command sets `module`, whose `run` executes it."""
    parser = _Parser(
        prog="fastbert",
        description="An engine for BERT and its family: vectors, answers and training, from Hugging Face checkpoints.",
        epilog="example:\n  fastbert embed path/to/model sentences.txt -o vectors.npy\n\n"
        "`fastbert COMMAND --help` says more about each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_CommandParser)
    _add_embed(commands)
    _add_tasks(commands)
    _add_fill_mask(commands)
    _add_serve(commands)
    _add_prepare(commands)
    _add_pretrain(commands)
    _add_finetune(commands)
    _add_distill(commands)
    _add_doctor(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors are two lines, the error first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\nsee {self.prog} --help\n")


class _CommandParser(_Parser):
    """A command's parser: positional arguments may stand before, between and after options."""

    _parsing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # In some versions of Python, parse_known_intermixed_args calls this method for its own passes.
        if self._parsing:
            return super().parse_known_args(args, namespace)
        self._parsing = True
        try:
            parsed, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._parsing = False
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        try:
            number = version("fastbert-engine")
        except PackageNotFoundError:  # a source tree that is not installed
            from fastbert import __version__ as number
        print(f"fastbert {number}")
        parser.exit()


def _command(commands: Any, name: str, module: str, help: str, epilog: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(module=module, parser=parser)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they were saved)")
    products = parser.add_mutually_exclusive_group()
    products.add_argument(
        "--precision", choices=SPLIT, help="float32 may be multiplied as three or six bf16 products (default: as it is)"
    )
    products.add_argument("--quantize", choices=QUANTIZED, help="multiply rounded to 8 bits (default: not)")
    parser.add_argument("--device", help="cpu, cuda or cuda:1, say (default: cuda where there is one, else cpu)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def _add_reading(parser: argparse.ArgumentParser, note: str) -> argparse._ArgumentGroup:
    """Adds the options for reading texts: the fields of input_files.Form, and the field or column of the text."""
    reading = parser.add_argument_group("input")
    reading.add_argument(
        "--input-format",
        dest="format",
        choices=("auto", "text", "jsonl", "json", "csv", "parquet"),
        default="auto",
        help="auto goes by the suffix: .jsonl, .ndjson, .json (a list), .csv, .tsv, .parquet, .txt, .md, each but "
        ".parquet also with .gz, .xz or .zst" + note,
    )
    reading.add_argument("--field", default="text", help="of a JSON object, the text (default: text)")
    reading.add_argument(
        "--column",
        default="text",
        help="of a csv or parquet file, the text: a name or, in csv, a number from 1 (default: text)",
    )
    add_csv_arguments(reading)
    return reading


def _add_embed(commands: Any) -> None:
    parser = _command(commands, "embed", "cli.embed", "turn texts into vectors", _EMBED_EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="a folder in Hugging Face layout, or a hub id")
    parser.add_argument("inputs", metavar="INPUT", nargs="*", default=["-"], help="files; - is stdin (default)")
    _add_model_options(parser)

    reading = _add_reading(parser, "; stdin is text, one a line")
    reading.add_argument(
        "--id-column", metavar="NAME", help="a csv or parquet column, or a JSON field, which .parquet and .jsonl repeat"
    )
    reading.add_argument("--allow-empty", action="store_true", help="embed empty texts; else they are bad lines")
    reading.add_argument(
        "--bad-lines",
        choices=("fail", "skip"),
        default="fail",
        help="a line that is not UTF-8, not JSON, without the field, empty: end the run (default) or skip it",
    )

    vectors = parser.add_argument_group(
        "vectors", "defaults are what the model's folder asks for, else mean, as they are"
    )
    poolings = f"{', '.join(POOLINGS)}; or several, as cls,max"
    vectors.add_argument("--pooling", metavar="NAMES", type=_poolings, help=poolings)
    vectors.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None, help="scale vectors to length 1"
    )
    prompts = vectors.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="put before each text; '' for none")
    prompts.add_argument("--prompt-name", metavar="NAME", help="the model's prompt of that name: query, say")
    vectors.add_argument("--truncate-dim", metavar="N", type=positive, help="keep the first N numbers of a vector")
    vectors.add_argument("--max-length", type=positive, help="most tokens of a text")
    vectors.add_argument(
        "--long",
        choices=("cut", "mean"),
        default="cut",
        help="longer texts are cut (default), or the mean of their overlapping windows, weighted by tokens",
    )
    vectors.add_argument("--max-tokens", type=positive, help="most tokens that go through the model together")
    vectors.add_argument(
        "--window", type=positive, help="texts sorted by length together and kept together (default: 2048)"
    )

    writing = parser.add_argument_group("output")
    writing.add_argument("-o", "--output", metavar="OUT", default="-", help="a file; - is stdout (default)")
    writing.add_argument(
        "--output-format",
        choices=("npy", "parquet", "jsonl"),
        help="(default: by OUT's suffix; stdout is jsonl)",
    )
    add_restart(writing, "an interrupted run away")


def _add_tasks(commands: Any) -> None:
    """Adds the commands that answer by a model's head, or by vectors."""
    told = "a folder in Hugging Face layout, or a hub id"

    def add(name: str, module: str, help: str, examples: str) -> argparse.ArgumentParser:
        parser = _command(commands, name, f"cli.{module}", help, examples)
        parser.add_argument("model", metavar="MODEL", help=told)
        _add_model_options(parser)
        return parser

    what = "answer for each row of a file, by the model's head"
    add_predict_arguments(add("predict", "predict", what, PREDICT_EXAMPLES))
    what = "score a model by the report of finetune"
    add_evaluate_arguments(add("evaluate", "evaluate", what, EVALUATE_EXAMPLES))
    what = "say which labels texts have, by a model of natural-language inference"
    add_predict_arguments(add("zero-shot", "predict", what, ZERO_SHOT_EXAMPLES), zero_shot=True)
    add_search_arguments(add("search", "search", "find the closest of many texts", SEARCH_EXAMPLES))
    add_rerank_arguments(add("rerank", "rerank", "put documents in order for a query", RERANK_EXAMPLES))
    add_summarize_arguments(add("summarize", "summarize", "choose the sentences that say most", SUMMARIZE_EXAMPLES))
    add_mine_arguments(add("mine", "mine", "find hard negatives to train on", MINE_EXAMPLES))
    what = "say on which tokens a prediction rests"
    add_explain_arguments(add("explain-text", "explain_text", what, EXPLAIN_EXAMPLES))


def _add_fill_mask(commands: Any) -> None:
    parser = _command(
        commands, "fill-mask", "cli.fill_mask", "name the likeliest words for each [MASK]", _FILL_MASK_EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", help="a folder in Hugging Face layout, or a hub id")
    parser.add_argument("texts", metavar="TEXT", nargs="+", help="a text with one [MASK] or more")
    parser.add_argument("--top-k", type=positive, default=5, help="words for each mask (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a mask")
    _add_model_options(parser)


def _add_prepare(commands: Any) -> None:
    parser = _command(commands, "prepare", "cli.prepare", "turn text into examples to pre-train on", _PREPARE_EXAMPLES)
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="files, or folders of files")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the folder to be made")
    vocabulary = parser.add_mutually_exclusive_group(required=True)
    vocabulary.add_argument("--vocab", metavar="PATH", help="a vocab.txt, or a folder with a tokenizer")
    vocabulary.add_argument("--learn-vocab", metavar="N", type=positive, help="learn N tokens from the text")
    parser.add_argument(
        "--lower",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="lower-case the text (default: yes, or as the tokenizer's folder says)",
    )

    reading = _add_reading(parser, ", as one piece; others are left out of a folder")
    reading.add_argument(
        "--documents",
        dest="separator",
        choices=("blank-line", "line", "file"),
        default="blank-line",
        help="what ends a document of a text file (default: blank-line); a line end always ends a sentence",
    )
    reading.add_argument(
        "--bad-documents",
        choices=("fail", "skip"),
        default="fail",
        help="one that is not UTF-8, not JSON, without the field, empty: end the run (default) or skip it",
    )

    examples = parser.add_argument_group("examples")
    examples.add_argument("--max-length", type=positive, default=512, help="most tokens of one (default: 512)")
    examples.add_argument(
        "--pairs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="pairs for next-sentence prediction (default), or runs of sentences of one document",
    )
    examples.add_argument(
        "--short-seq-prob",
        type=float,
        metavar="P",
        help="share of documents cut to shorter examples (default: 0.1 for pairs, 0 for runs)",
    )
    examples.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of documents, kept for evaluation (default: 0)",
    )
    examples.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")

    running = parser.add_argument_group("run")
    running.add_argument("--processes", type=positive, default=1, help="how many work at once (default: 1)")
    running.add_argument("--shard-mib", type=positive, default=32, help="MiB of text in a shard (default: 32)")
    add_restart(running, "away what an earlier run made of OUT")


def _add_pretrain(commands: Any) -> None:
    parser = _command(commands, "pretrain", "cli.pretrain", "train a BERT on prepared text", _PRETRAIN_EXAMPLES)
    parser.add_argument("config", metavar="CONFIG", help="a TOML file; docs/pretrain.toml is one with every key")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="in place of the file's; may be repeated",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1, say (default: cuda where there is one, else cpu)")


def _add_finetune(commands: Any) -> None:
    parser = _command(commands, "finetune", "cli.finetune", "train a model for a task", FINETUNE_EXAMPLES)
    add_finetune_arguments(parser)


def _add_distill(commands: Any) -> None:
    what = "make a smaller model that does as a larger one"
    add_distill_arguments(_command(commands, "distill", "cli.distill", what, DISTILL_EXAMPLES))


def _add_serve(commands: Any) -> None:
    what = "answer over HTTP: vectors, classes, tags, scores"
    add_serve_arguments(_command(commands, "serve", "cli.serve", what, SERVE_EXAMPLES))


def _add_doctor(commands: Any) -> None:
    what = "say what runs on this machine, and why"
    _command(commands, "doctor", "cli.doctor", what, _DOCTOR_EXAMPLES)


def _poolings(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in POOLINGS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(POOLINGS)}")
    return names


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    print(f"fastbert: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
