"""The arguments of `fastbert distill`. (Apart from the command, which imports torch.)"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from fastbert.finetune_arguments import FINETUNE_TASKS, add_task_arguments

DISTILL_EXAMPLES = """\
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


def add_distill_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Gives the parser the command's arguments; what is not given keeps the default of the settings."""
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
    add_task_arguments(parser, positive, required=False)

    student = parser.add_argument_group("student", "sizes are the teacher's without; layers are counted from 0")
    student.add_argument("--num-layers", type=positive, metavar="N", help="of the teacher's, spread evenly")
    student.add_argument("--layers", type=_numbers, metavar="A,B,...", help="of the teacher's, which they begin as")
    student.add_argument("--hidden-size", type=positive, metavar="N")
    student.add_argument("--intermediate-size", type=positive, metavar="N", help="(default: in proportion)")
    student.add_argument("--num-attention-heads", type=positive, metavar="N", help="(default: of the same width)")
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
    losses.add_argument("--relation-heads", type=positive, metavar="N", help="(default: as many as the teacher has)")
    losses.add_argument("--relation-layer", type=int, metavar="N", help="of the teacher (default: its last)")
    losses.add_argument("--teacher-precision", choices=("fp32", "bf16"), help="(default: fp32)")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, as 0,2,4") from None
