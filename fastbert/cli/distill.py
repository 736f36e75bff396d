"""`fastbert distill`: trains a student, for a task or on plain text."""

from __future__ import annotations

import argparse
from functools import partial

import torch

from fastbert.cli.finetune import carry_out, given_options, prepare_output, read_recipe
from fastbert.cli.options import given
from fastbert.cli.pretrain import fresh_model, train
from fastbert.config import BertConfig
from fastbert.model import BertPreTrainedModel
from fastbert.precision import torch_device
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.distill.settings import DistillationSettings, TextSettings
from fastbert.training.distill.student import check_vocabularies, make_student
from fastbert.training.distill.task import TaskDistillation
from fastbert.training.distill.teacher import in_precision, labels_of, load_teacher
from fastbert.training.distill.text import TextDistillation
from fastbert.training.finetune.tasks import TASKS
from fastbert.training.objective import model_class
from fastbert.training.settings import SettingsError, load_settings, read_section
from fastbert.training.shards import Shards

WITH_CONFIG = ("set", "resume", "device", "debug")
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads")


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert distill`; returns the exit code."""
    if args.config is not None:
        if others := [option for name, option in given_options(args) if name not in WITH_CONFIG]:
            raise ValueError(
                f"CONFIG and {others[0]} are both given; a CONFIG, for plain text, says everything: --set changes it"
            )
        return _on_text(args)
    if args.set:
        raise ValueError(f"--set {args.set[0]} is given and no CONFIG, in whose place it is")
    if missing := [name for name in ("task", "teacher", "train", "output") if getattr(args, name) is None]:
        raise ValueError(f"--{missing[0]} is missing; without a CONFIG, distillation is for a task")
    return _for_task(args)


def _for_task(args: argparse.Namespace) -> int:
    folder, newest = prepare_output(args)
    device = torch.device(torch_device(args.device))
    distillation = read_section("distillation", DistillationSettings, given(args, DistillationSettings))
    task = TASKS[args.task]
    kind = task.model.of(BertConfig.from_pretrained(args.teacher, revision=args.revision))
    teacher = load_teacher(kind, args.teacher, revision=args.revision)
    if task.problem_type is not None:
        teacher.config.problem_type = task.problem_type
    recipe = read_recipe(args, args.teacher, labels_of(teacher.config))
    sizes = {name: getattr(args, name) for name in SIZES}
    if args.student is None:
        student = make_student(
            teacher,
            layers=distillation.layers,
            num_layers=args.num_layers,
            dropout=recipe.settings.dropout,
            **sizes,
        )
    else:
        named = {"layers": distillation.layers, "num_layers": args.num_layers, **sizes}
        if clash := [name for name, value in named.items() if value is not None]:
            raise ValueError(f"--student has sizes of its own; --{clash[0].replace('_', '-')} is for one made again")
        check_vocabularies(recipe.tokenizer, AutoTokenizer.from_pretrained(args.student))
        student = recipe.fresh_model(args.student)
    teacher = in_precision(teacher.to(device), distillation.teacher_precision)
    distilling = TaskDistillation(recipe, student.to(device), teacher, distillation, folder)
    return carry_out(distilling, newest, args.student or args.teacher)


def _on_text(args: argparse.Namespace) -> int:
    settings = load_settings(args.config, args.set, TextSettings)
    distillation = settings.distillation
    kind = model_class(settings.training.objective, BertConfig.from_pretrained(distillation.teacher))
    teacher = load_teacher(kind, distillation.teacher, head=distillation.output_weight > 0)

    def objective(student: BertPreTrainedModel) -> TextDistillation:
        own = in_precision(teacher.to(student.device), distillation.teacher_precision)
        return TextDistillation(student, own, distillation)

    return train(settings, args.device, resume=args.resume, begin=partial(text_student, teacher), objective=objective)


def text_student(
    teacher: BertPreTrainedModel, settings: TextSettings, tokenizer: Tokenizer, shards: Shards
) -> BertPreTrainedModel:
    """The initial student: made from the teacher, or loaded from a checkpoint.

    Raises:
        ValueError: its vocabulary or sizes do not fit the teacher or the shards.
    """
    wanted = settings.model
    shards.check_model(teacher.config, AutoTokenizer.from_pretrained(settings.distillation.teacher))
    if wanted.checkpoint is not None:
        return fresh_model(settings, tokenizer, shards)
    for name in ("vocab_size", "max_position_embeddings", "hidden_act"):
        if getattr(wanted, name) is not None:
            raise SettingsError(f"model.{name} is given; a student made of its teacher has the teacher's")
    return make_student(
        teacher,
        layers=settings.distillation.layers,
        num_layers=wanted.num_hidden_layers,
        dropout=settings.training.dropout,
        **{name: getattr(wanted, name) for name in SIZES},
    )
