"""The arguments of `fastbert finetune`. (Apart from the command, which imports torch.)"""

from __future__ import annotations

import argparse
from collections.abc import Callable

FINETUNE_TASKS = (
    "classification",
    "multi-label",
    "regression",
    "token-classification",
    "question-answering",
    "multiple-choice",
)
FINETUNE_EXAMPLES = """\
examples:
  fastbert finetune --task classification --model path/to/model --train train.csv --dev dev.csv -o out
  fastbert finetune --task regression --model path/to/model --train pairs.tsv --dev dev.tsv --text-column first \\
      --pair-column second --label-column score -o out
  fastbert finetune --task token-classification --model path/to/model --train train.conll --dev dev.conll -o out
  fastbert finetune --task question-answering --model path/to/model --train squad.json --dev dev.json -o out

DIR holds a model that transformers loads, and report/: metrics.json, learning-curves.png, predictions-dev.jsonl
and, for classification, a confusion matrix. Scores are shares (0 to 1). docs/recipes.md has whole recipes.
"""


def add_finetune_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Gives the parser the command's arguments; what is not given keeps the default of FinetuneSettings or Reading."""
    parser.add_argument("--task", choices=FINETUNE_TASKS, required=True)
    parser.add_argument("--model", metavar="MODEL", required=True, help="a folder in Hugging Face layout, or a hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_task_arguments(parser, positive, required=True)


def add_task_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int], *, required: bool) -> None:
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
        "--format",
        choices=("auto", "csv", "jsonl", "json", "parquet", "conll", "squad"),
        help="(default: by the suffix)",
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
    reading.add_argument(
        "--words-column", dest="words", metavar="NAME", help="a list; in CoNLL, a number from 1 (default: words)"
    )
    reading.add_argument(
        "--tags-column", dest="tags", metavar="NAME", help="a list; in CoNLL, a number from 1 (default: tags)"
    )
    reading.add_argument("--question-column", dest="question", metavar="NAME", help="(default: question)")
    reading.add_argument("--context-column", dest="context", metavar="NAME", help="(default: context)")
    reading.add_argument("--answers-column", dest="answers", metavar="NAME", help="(default: answers)")
    add_csv_arguments(reading)

    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs", type=positive, help="(default: 3; for few examples more, so that there are 150 steps, up to 20)"
    )
    training.add_argument("--batch-size", type=positive, metavar="N", help="examples, at most (default: 16)")
    training.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="in a batch, at most (default: 2048; with --batch-size, any number)",
    )
    training.add_argument("--accumulate", type=positive, metavar="N", help="batches in a step (default: 1)")
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
    training.add_argument("--evaluate-every", type=positive, metavar="STEPS", help="(default: each epoch)")
    training.add_argument("--save-every", type=positive, metavar="STEPS", help="checkpoints (default: each evaluation)")
    training.add_argument(
        "--tensorboard", action="store_true", default=None, help="write event files to DIR/tensorboard"
    )
    training.add_argument(
        "--best",
        metavar="SCORE",
        help="score on the dev examples, or loss, by which the best checkpoint is chosen; of equal scores, the lower "
        "loss is better (default: f1_macro for classification, f1_micro for multi-label, spearman for regression, f1 "
        "for token-classification and question-answering, accuracy for multiple-choice)",
    )
    training.add_argument("--patience", type=positive, metavar="N", help="end after N evaluations without a better")

    texts = parser.add_argument_group("texts")
    texts.add_argument("--max-length", type=positive, help="tokens (default: as the model takes; 384 for questions)")
    texts.add_argument("--stride", type=int, help="tokens that windows of a context share (default: 128)")
    texts.add_argument("--max-question", type=positive, help="tokens of a question (default: 64)")
    texts.add_argument("--n-best", type=positive, help="starts and ends of answers to try (default: 20)")
    texts.add_argument("--max-answer", type=positive, help="tokens of an answer (default: 30)")
    texts.add_argument(
        "--unanswerable",
        dest="no_answer",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether a question may have no answer (default: as in the training data)",
    )
    texts.add_argument(
        "--null-threshold", type=float, help="by which no answer must be better than the best (default: 0)"
    )


def add_csv_arguments(group: argparse._ArgumentGroup) -> None:
    """Options for csv files, which every command that reads them takes."""
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
