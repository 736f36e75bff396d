"""The command `fastbert`: embed, fill-mask, prepare, pretrain, finetune, distill, doctor.

Exit codes: 0 done; 1 failed, with one line on stderr; 2 wrong usage; 130 interrupted; 141 the reader of the output
went away; 143 stopped by SIGTERM. torch and all that needs it are imported by the commands that use them.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from fastbert.precision import QUANTIZED, SPLIT

FAILED, INTERRUPTED, BROKEN_PIPE = 1, 130, 141
FINETUNE_TASKS = (
    "classification",
    "multi-label",
    "regression",
    "token-classification",
    "question-answering",
    "multiple-choice",
)
DTYPES = ("float32", "bfloat16", "float16")

_EMBED_EXAMPLES = """\
examples:
  fastbert embed path/to/model sentences.txt -o vectors.npy
  fastbert embed path/to/model reviews.csv --column review -o vectors.parquet --bad-lines skip
  zcat big.jsonl.gz | fastbert embed path/to/model - --input-format jsonl --field body -o big.npy --resume
  fastbert embed path/to/model queries.txt | head -1

rows and lines:
  .npy        row i is record i (line i of a text or jsonl file); a skipped line is a row of NaN
  .parquet    columns line, embedding; and file, with several inputs. A skipped line has no row
  .jsonl      {"line": 1, "embedding": [...]}, and "file" with several inputs. A skipped line has no row

interruption:
  OUT appears when it is complete. Until then OUT.partial and OUT.journal.json stand beside it; after Ctrl-C,
  a kill or a crash, the same command with --resume goes on with the first window that was not finished. The
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
same command with --resume goes on with the shards that were not finished.
"""
_PRETRAIN_EXAMPLES = """\
examples:
  fastbert pretrain config.toml
  fastbert pretrain config.toml --resume --set training.log_every=1
  torchrun --nproc-per-node 8 -m fastbert.cli pretrain config.toml --resume

interruption:
  On SIGTERM and Ctrl-C the run ends with a checkpoint. After a kill or a crash, too, the same command with
  --resume goes on with the newest checkpoint in output.folder, or begins where there is none.
"""
_FINETUNE_EXAMPLES = """\
examples:
  fastbert finetune --task classification --model path/to/model --train train.csv --dev dev.csv -o out
  fastbert finetune --task regression --model path/to/model --train pairs.tsv --dev dev.tsv --text-column first \\
      --pair-column second --label-column score -o out
  fastbert finetune --task token-classification --model path/to/model --train train.conll --dev dev.conll -o out
  fastbert finetune --task question-answering --model path/to/model --train squad.json --dev dev.json -o out

DIR holds a model that transformers loads, and report/: metrics.json, learning-curves.png, predictions-dev.jsonl
and, for classification, a confusion matrix. Scores are shares (0 to 1). docs/recipes.md has whole recipes.
"""
_DISTILL_EXAMPLES = """\
examples:
  fastbert distill --task classification --teacher path/to/teacher --num-layers 3 --train train.csv --dev dev.csv -o out
  fastbert distill --task classification --teacher path/to/teacher --layers 0,2,4 --hidden-size 192 --alpha 0.2 \\
      --temperature 4 --train train.csv --dev dev.csv -o out
  fastbert distill distill.toml

For a task, the teacher is a model trained for it, and DIR holds what `fastbert finetune` writes. On plain text, a
file such as docs/distill.toml says everything, and the run is one of `fastbert pretrain`.

loss:
  output-weight (alpha labels + (1 - alpha) soft targets) + hidden-weight states + relation-weight relations
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
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("fastbert: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if args.debug:
            raise
        print(f"fastbert: error: {_one_line(error)}", file=sys.stderr)
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each command sets `run`."""
    parser = argparse.ArgumentParser(
        prog="fastbert",
        description="A BERT engine: vectors and masked words from Hugging Face checkpoints.",
        epilog="example:\n  fastbert embed path/to/model sentences.txt -o vectors.npy\n\n"
        "`fastbert COMMAND --help` says more about each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_embed(commands)
    _add_fill_mask(commands)
    _add_prepare(commands)
    _add_pretrain(commands)
    _add_finetune(commands)
    _add_distill(commands)
    _add_doctor(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            number = version("fastbert-engine")
        except PackageNotFoundError:  # a source tree that is not installed
            from fastbert import __version__ as number
        print(f"fastbert {number}")
        parser.exit()


def _command(commands, name: str, run, help: str, epilog: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they were saved)")
    products = parser.add_mutually_exclusive_group()
    products.add_argument(
        "--precision", choices=SPLIT, help="float32 may be multiplied as three or six bf16 products (default: as it is)"
    )
    products.add_argument(
        "--quantize", choices=QUANTIZED, help="multiply rounded to 8 bits; fp8 on a GPU (default: not)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1, say (default: cuda where there is one, else cpu)")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def _add_embed(commands) -> None:
    parser = _command(commands, "embed", _embed, "turn texts into vectors", _EMBED_EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="a folder in Hugging Face layout, or a hub id")
    parser.add_argument("inputs", metavar="INPUT", nargs="*", default=["-"], help="files; - is stdin (default)")
    _add_model_options(parser)

    reading = parser.add_argument_group("input")
    reading.add_argument(
        "--input-format",
        choices=("auto", "text", "jsonl", "csv"),
        default="auto",
        help="auto goes by the suffix: .jsonl, .ndjson, .csv, .tsv; text, one a line, otherwise",
    )
    reading.add_argument("--field", default="text", help="of a JSON object, the text (default: text)")
    reading.add_argument(
        "--column", default="text", help="of a csv file, the text: a name, or a number from 1 (default: text)"
    )
    reading.add_argument("--delimiter", help="between csv fields (default: a comma, or a tab for .tsv)")
    reading.add_argument("--no-header", action="store_true", help="the csv file has no line of column names")
    reading.add_argument("--unquoted", action="store_true", help='" has no meaning in the csv file')
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
    vectors.add_argument("--pooling", choices=("mean", "cls", "pooler"))
    vectors.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None, help="scale vectors to length 1"
    )
    vectors.add_argument("--max-length", type=_positive, help="tokens a text is cut to")
    vectors.add_argument("--max-tokens", type=_positive, help="most tokens that go through the model together")
    vectors.add_argument(
        "--window", type=_positive, help="texts sorted by length together and kept together (default: 2048)"
    )

    writing = parser.add_argument_group("output")
    writing.add_argument("-o", "--output", metavar="OUT", default="-", help="a file; - is stdout (default)")
    writing.add_argument(
        "--output-format",
        choices=("npy", "parquet", "jsonl"),
        help="(default: by OUT's suffix; stdout is jsonl)",
    )
    again = writing.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an interrupted run, if there is one")
    again.add_argument("--restart", action="store_true", help="throw an interrupted run away")
    writing.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no summary")


def _add_fill_mask(commands) -> None:
    parser = _command(
        commands, "fill-mask", _fill_mask, "name the likeliest words for each [MASK]", _FILL_MASK_EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", help="a folder in Hugging Face layout, or a hub id")
    parser.add_argument("texts", metavar="TEXT", nargs="+", help="a text with one [MASK] or more")
    parser.add_argument("--top-k", type=_positive, default=5, help="words for each mask (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a mask")
    _add_model_options(parser)


def _add_prepare(commands) -> None:
    parser = _command(commands, "prepare", _prepare, "turn text into examples to pre-train on", _PREPARE_EXAMPLES)
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="files, or folders of files")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the folder to be made")
    vocabulary = parser.add_mutually_exclusive_group(required=True)
    vocabulary.add_argument("--vocab", metavar="PATH", help="a vocab.txt, or a folder with a tokenizer")
    vocabulary.add_argument("--learn-vocab", metavar="N", type=_positive, help="learn N tokens from the text")
    parser.add_argument(
        "--lower",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="lower-case the text (default: yes, or as the tokenizer's folder says)",
    )

    reading = parser.add_argument_group("input")
    reading.add_argument(
        "--input-format",
        choices=("auto", "text", "jsonl", "parquet"),
        default="auto",
        help="auto goes by the suffix: .jsonl, .ndjson, .parquet; text otherwise",
    )
    reading.add_argument(
        "--documents",
        choices=("blank-line", "line", "file"),
        default="blank-line",
        help="what ends a document of a text file (default: blank-line); a line end always ends a sentence",
    )
    reading.add_argument("--field", default="text", help="of a JSON object, the text (default: text)")
    reading.add_argument("--column", default="text", help="of a parquet file, the text (default: text)")
    reading.add_argument(
        "--bad-documents",
        choices=("fail", "skip"),
        default="fail",
        help="one that is not UTF-8, not JSON, without the field, empty: end the run (default) or skip it",
    )

    examples = parser.add_argument_group("examples")
    examples.add_argument("--max-length", type=_positive, default=512, help="most tokens of one (default: 512)")
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
    running.add_argument("--processes", type=_positive, default=1, help="how many work at once (default: 1)")
    running.add_argument("--shard-mib", type=_positive, default=32, help="MiB of text in a shard (default: 32)")
    again = running.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an interrupted run, if there is one")
    again.add_argument("--restart", action="store_true", help="throw away what an earlier run made of OUT")
    running.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no summary")


def _add_pretrain(commands) -> None:
    parser = _command(commands, "pretrain", _pretrain, "train a BERT on prepared text", _PRETRAIN_EXAMPLES)
    parser.add_argument("config", metavar="CONFIG", help="a TOML file; docs/pretrain.toml is one with every key")
    parser.add_argument("--resume", action="store_true", help="go on with the newest checkpoint, if there is one")
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="in place of the file's; may be repeated",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1, say (default: cuda where there is one, else cpu)")


def _add_finetune(commands) -> None:
    parser = _command(commands, "finetune", _finetune, "train a model for a task", _FINETUNE_EXAMPLES)
    parser.add_argument("--task", choices=FINETUNE_TASKS, required=True)
    parser.add_argument("--model", metavar="MODEL", required=True, help="a folder in Hugging Face layout, or a hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    _add_task_options(parser, required=True)


def _add_task_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """What training for a task takes beside the models; `required`: there is no other way to train."""
    parser.add_argument("--train", metavar="FILE", required=required, help="examples to learn from")
    parser.add_argument("--dev", metavar="FILE", required=required, help="examples to choose the best checkpoint by")
    parser.add_argument("--test", metavar="FILE", help="examples for the report")
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=required, help="the model, and its report in DIR/report"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the newest checkpoint, if there is one")
    parser.add_argument("--device", help="cpu, cuda or cuda:1, say (default: cuda where there is one, else cpu)")

    reading = parser.add_argument_group("input", "columns are names, in csv also numbers from 1; in jsonl, keys")
    reading.add_argument(
        "--format", choices=("auto", "csv", "jsonl", "conll", "squad"), help="(default: by the suffix)"
    )
    reading.add_argument("--text-column", dest="text", metavar="NAME", help="(default: text)")
    reading.add_argument("--pair-column", dest="pair", metavar="NAME", help="the second text of a pair")
    reading.add_argument(
        "--label-column", dest="label", metavar="NAME", help="class, number or classes (default: label)"
    )
    reading.add_argument("--label-separator", metavar="TEXT", help="between several classes (default: a comma)")
    reading.add_argument(
        "--choice-columns",
        dest="choices",
        type=lambda text: tuple(text.split(",")),
        metavar="A,B,...",
        help="a column each, or one of lists (default: choices)",
    )
    reading.add_argument("--words-column", dest="words", metavar="NAME", help="in jsonl, a list (default: words)")
    reading.add_argument("--tags-column", dest="tags", metavar="NAME", help="in jsonl, a list (default: tags)")
    reading.add_argument("--question-column", dest="question", metavar="NAME", help="(default: question)")
    reading.add_argument("--context-column", dest="context", metavar="NAME", help="(default: context)")
    reading.add_argument("--answers-column", dest="answers", metavar="NAME", help="(default: answers)")
    reading.add_argument("--delimiter", help="between csv fields (default: a comma, or a tab for .tsv)")
    reading.add_argument("--no-header", dest="header", action="store_false", help="the csv has no line of column names")
    reading.add_argument("--unquoted", dest="quoted", action="store_false", help='" has no meaning in the csv file')

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=_positive, help="(default: 3)")
    training.add_argument("--batch-size", type=_positive, metavar="N", help="examples (default: as --tokens says)")
    training.add_argument("--tokens", type=_positive, metavar="N", help="in a batch, at most (default: 2048)")
    training.add_argument("--accumulate", type=_positive, metavar="N", help="batches in a step (default: 1)")
    training.add_argument("--order", choices=("random", "length"), help="length: like lengths together, shuffled")
    training.add_argument("--lr", type=float, help="at the top of the schedule (default: 5e-5)")
    training.add_argument("--schedule", choices=("linear", "cosine", "constant"), help="(default: linear)")
    training.add_argument("--warmup-share", type=float, metavar="SHARE", help="of all steps (default: 0.1)")
    training.add_argument("--weight-decay", type=float, help="of all but biases and LayerNorm (default: 0.01)")
    training.add_argument("--max-grad-norm", type=float, help="0: gradients are not clipped (default: 1)")
    training.add_argument(
        "--layer-decay", type=float, metavar="FACTOR", help="of the rate, from layer to layer downwards (default: 1)"
    )
    training.add_argument("--freeze-embeddings", action="store_true", default=None, help="leave them as they are")
    training.add_argument("--freeze-layers", type=int, metavar="N", help="leave the first N layers as they are")
    training.add_argument("--dropout", type=float, help="in place of the model's")
    training.add_argument(
        "--class-weights", choices=("none", "balanced"), help="balanced: rare classes count as much as frequent ones"
    )
    training.add_argument("--precision", choices=("fp32", "bf16"), help="of the products (default: fp32)")
    training.add_argument("--seed", type=int, help="of all that is drawn (default: 0)")
    training.add_argument("--evaluate-every", type=_positive, metavar="STEPS", help="(default: each epoch)")
    training.add_argument("--best", metavar="SCORE", help="by which the best checkpoint is known; loss, too")
    training.add_argument("--patience", type=_positive, metavar="N", help="end after N evaluations without a better")

    texts = parser.add_argument_group("texts")
    texts.add_argument("--max-length", type=_positive, help="tokens (default: as the model takes; 384 for questions)")
    texts.add_argument("--stride", type=int, help="tokens that windows of a context share (default: 128)")
    texts.add_argument("--max-question", type=_positive, help="tokens of a question (default: 64)")
    texts.add_argument("--n-best", type=_positive, help="starts and ends of answers to try (default: 20)")
    texts.add_argument("--max-answer", type=_positive, help="tokens of an answer (default: 30)")
    texts.add_argument(
        "--no-answer",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether a question may have no answer (default: as in the training data)",
    )
    texts.add_argument(
        "--null-threshold", type=float, help="by which no answer must be better than the best (default: 0)"
    )


def _add_distill(commands) -> None:
    parser = _command(
        commands, "distill", _distill, "make a smaller model that does as a larger one", _DISTILL_EXAMPLES
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="for plain text: a TOML file as docs/distill.toml")
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="in place of the CONFIG's; may be repeated",
    )
    parser.add_argument("--task", choices=FINETUNE_TASKS)
    parser.add_argument("--teacher", metavar="MODEL", help="a folder or hub id, trained for the task")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    _add_task_options(parser, required=False)

    student = parser.add_argument_group("student", "sizes are the teacher's without; layers are counted from 0")
    student.add_argument("--num-layers", type=_positive, metavar="N", help="of the teacher's, spread evenly")
    student.add_argument("--layers", type=_numbers, metavar="A,B,...", help="of the teacher's, which they begin as")
    student.add_argument("--hidden-size", type=_positive, metavar="N")
    student.add_argument("--intermediate-size", type=_positive, metavar="N", help="(default: in proportion)")
    student.add_argument("--num-attention-heads", type=_positive, metavar="N", help="(default: of the same width)")
    student.add_argument("--student", metavar="MODEL", help="in place of all these, a model to begin with")

    losses = parser.add_argument_group("distillation")
    losses.add_argument("--temperature", type=float, help="of the soft targets (default: 2)")
    losses.add_argument("--alpha", type=float, help="share of the labels beside the soft targets (default: 0.5)")
    losses.add_argument("--output-weight", type=float, help="of both (default: 1)")
    losses.add_argument("--hidden-weight", type=float, help="of the states after each layer (default: 1)")
    losses.add_argument("--hidden-loss", choices=("mse", "cosine"), help="(default: mse)")
    losses.add_argument(
        "--hidden-layers", type=_numbers, metavar="A,B,...", help="of the teacher's, one for each of the student's"
    )
    losses.add_argument("--relation-weight", type=float, help="of how tokens relate in the last layer (default: 0)")
    losses.add_argument(
        "--relations",
        type=lambda text: tuple(text.split(",")),
        metavar="qq,kk,vv",
        help="of queries, keys and values; qk is the attention (default: qq,kk,vv)",
    )
    losses.add_argument("--relation-heads", type=_positive, metavar="N", help="(default: as many as the teacher has)")
    losses.add_argument("--relation-layer", type=int, metavar="N", help="of the teacher (default: its last)")
    losses.add_argument("--teacher-precision", choices=("fp32", "bf16"), help="(default: fp32)")


def _add_doctor(commands) -> None:
    what = "say what runs on this machine, and why"
    _command(commands, "doctor", _doctor, what, _DOCTOR_EXAMPLES)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, as 0,2,4") from None


def _embed(args: argparse.Namespace) -> int:
    from fastbert.embed_command import run

    return run(args)


def _fill_mask(args: argparse.Namespace) -> int:
    import json

    from fastbert.inference.fill_mask import FillMask

    model = FillMask.from_pretrained(args.model, revision=args.revision, inference_only=True, **placement(args))
    for text in args.texts:
        masks = model(text, top_k=args.top_k)
        for number, candidates in enumerate(masks, start=1):
            if args.json:
                rows = [candidate._asdict() for candidate in candidates]
                print(json.dumps({"text": text, "mask": number, "candidates": rows}, ensure_ascii=False))
                continue
            print(text if len(masks) == 1 else f"{text}  ({number} of {len(masks)})")
            width = max(len(candidate.token) for candidate in candidates)
            for token, probability, sequence in candidates:
                print(f"  {probability:6.1%}  {token:<{width}}  {sequence}")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from fastbert.training.prepare_command import run

    return run(args)


def _pretrain(args: argparse.Namespace) -> int:
    from fastbert.pretrain_command import run

    return run(args)


def _finetune(args: argparse.Namespace) -> int:
    from fastbert.finetune_command import run

    return run(args)


def _distill(args: argparse.Namespace) -> int:
    from fastbert.distill_command import run

    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    from fastbert.doctor import diagnosis

    print(diagnosis())
    return 0


def placement(args: argparse.Namespace) -> dict:
    """What --dtype, --precision, --quantize and --device ask for, as from_pretrained takes it."""
    import torch

    dtype = getattr(torch, args.dtype) if args.dtype else None
    return {"dtype": dtype, "precision": args.precision, "quantize": args.quantize, "device": device_of(args.device)}


def device_of(name: str | None) -> str:
    """The device of that name, or without one a GPU where there is one.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device}: {_one_line(error)}") from error
    return device


def _one_line(error: BaseException) -> str:
    """An error's message on one line, after its type's name where the message alone says too little."""
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror + (f": {error.filename}" if error.filename else "")
    told = type(error) in (
        ValueError,
        TypeError,
        FileNotFoundError,
        NotADirectoryError,
        OSError,
        PermissionError,
    )
    if told or type(error).__module__.startswith("fastbert"):
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} (--debug shows where)"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"fastbert: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
