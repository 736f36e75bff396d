"""The arguments of `fastbert distill`, in a module that does not import torch."""

from __future__ import annotations

import argparse

from fastbert.cli.finetune_arguments import DISTILLED_TASKS, add_options, add_task_arguments, numbers, positive
from fastbert.training.distill.settings import DistillationSettings

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


def add_distill_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments to the parser; omitted ones have the defaults of the settings."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="for plain text: a TOML file as docs/distill.toml")
    parser.add_argument(
        "--set",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="in place of the CONFIG's; may be repeated",
    )
    parser.add_argument("--task", choices=DISTILLED_TASKS)
    parser.add_argument("--teacher", metavar="MODEL", help="a folder or hub id, trained for the task")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_task_arguments(parser, required=False)

    student = parser.add_argument_group("student", "sizes are the teacher's without; layers are counted from 0")
    student.add_argument("--num-layers", type=positive, metavar="N", help="of the teacher's, spread evenly")
    student.add_argument("--layers", type=numbers, metavar="A,B,...", help="of the teacher's, which they begin as")
    student.add_argument("--hidden-size", type=positive, metavar="N")
    student.add_argument("--intermediate-size", type=positive, metavar="N", help="(default: in proportion)")
    student.add_argument("--num-attention-heads", type=positive, metavar="N", help="(default: of the same width)")
    student.add_argument("--student", metavar="MODEL", help="in place of all these, a model to begin with")

    add_options(parser.add_argument_group("distillation"), DistillationSettings)
