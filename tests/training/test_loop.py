"""The loop: what stops it, what it reports, what it keeps, in which precision it runs."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace

import pytest
import torch
from training_support import MadeUpBatches, make_run, make_settings, resumed_run

import fastbert
from fastbert.progress import StatusLine, duration
from fastbert.training import logs
from fastbert.training.logs import Log, progress_line
from fastbert.training.loop import TrainingError
from fastbert.training.training_state import CheckpointError, Checkpoints, TrainingState


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_transformers_loads_a_checkpoint(tmp_path):
    import transformers

    run = make_run(make_settings(tmp_path), dropout=0.0)
    outcome = run.run()
    model, info = transformers.BertForPreTraining.from_pretrained(outcome.checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[2, 6, 7, 3]])
    with torch.no_grad():
        ours, theirs = run.model.eval()(ids), model.eval()(ids)
    torch.testing.assert_close(ours.prediction_logits, theirs.prediction_logits, rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(outcome.checkpoint)
    assert (
        tokenizer("the cat sat").input_ids
        == fastbert.BertTokenizer.from_pretrained(outcome.checkpoint)("the cat sat")["input_ids"]
    )


def test_it_learns(tmp_path):
    settings = make_settings(
        tmp_path, training__steps=60, training__save_every=60, training__evaluate_every=20, optimizer__lr=1e-2
    )
    make_run(settings).run()
    heldout = [line for line in read_log(tmp_path) if line["kind"] == "heldout"]
    assert [line["step"] for line in heldout] == [20, 40, 60]
    assert heldout[-1]["mlm_loss"] < math.log(15) - 0.2  # below what knows nothing but the number of words
    assert heldout[-1]["loss"] == pytest.approx(heldout[-1]["mlm_loss"] + heldout[-1]["nsp_loss"])


@pytest.mark.parametrize("objective", ["mlm_nsp", "mlm", "nsp"])
def test_the_log_has_both_parts_or_the_one_there_is(tmp_path, objective):
    make_run(make_settings(tmp_path, training__objective=objective)).run()
    parts = objective.split("_")
    for line in read_log(tmp_path):
        assert {name for name in line if name.endswith("_loss")} == {f"{part}_loss" for part in parts}
        assert line["loss"] == pytest.approx(sum(line[f"{part}_loss"] for part in parts))
        if line["kind"] == "heldout":
            assert {name for name in line if name.endswith("_accuracy")} == {f"{part}_accuracy" for part in parts}


def test_rate_norm_and_means_of_the_log(tmp_path):
    one, two = (make_settings(tmp_path / str(n), training__log_every=n, training__evaluate_every=100) for n in (1, 2))
    make_run(one).run()
    make_run(two).run()
    singles, pairs = ([line for line in read_log(tmp_path / n) if line["kind"] == "train"] for n in ("1", "2"))
    assert [line["learning_rate"] for line in singles] == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    for name in ("loss", "mlm_loss", "gradient_norm"):
        means = [(a[name] + b[name]) / 2 for a, b in zip(singles[::2], singles[1::2], strict=True)]
        assert [line[name] for line in pairs] == pytest.approx(means)


def test_mfu_is_flops_by_time_by_peak(tmp_path):
    make_run(make_settings(tmp_path, training__evaluate_every=100), peak_flops=1e9).run()
    make_run(make_settings(tmp_path / "without", training__evaluate_every=100)).run()
    for line in read_log(tmp_path):
        if line["kind"] == "train":
            # 2 layers of 4 E^2 + 2 E F weights, the last to its attention; that, the tokens that the heads read, and
            # the heads come on top.
            least = 3 * 2 * (7 * 48**2 + 2 * 48 * 96) * line["tokens_per_second"] / 1e9
            assert least < line["mfu"] < 1.5 * least
    assert {line.get("mfu") for line in read_log(tmp_path / "without")} == {None}


def poison(run, step, value=math.nan):
    """Puts a value that is not finite into the weights before step `step`, counted from 0."""
    train = run._train

    def poisoned(*args):
        if run.step == step:
            run.model.cls.predictions.bias.data[3] = value
        train(*args)

    run._train = poisoned


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_one_clear_error_and_never_saved(tmp_path, value):
    settings = make_settings(tmp_path, training__log_every=100)
    run = make_run(settings, heldout=False)  # it is when a checkpoint is due that the loss is looked at
    poison(run, 2, value)
    with pytest.raises(
        TrainingError, match=r"^step 3: the MLM loss is (nan|inf).*; the last good checkpoint is .*0002$"
    ):
        run.run()
    assert [p.name for p in run.checkpoints.complete()] == ["step-00000002"]
    assert resumed_run(settings).run().step == 6
    run = make_run(make_settings(tmp_path / "other"))
    poison(run, 0, value)
    with pytest.raises(TrainingError, match=r"^step 1: .*; there is no checkpoint before it$"):
        run.run()


def test_weights_that_the_last_step_made_not_finite_are_never_saved(tmp_path):
    settings = make_settings(tmp_path)
    run = make_run(settings)
    train = run._train

    def poisoned(*args):
        train(*args)
        if run.step == settings.training.steps:
            run.model.cls.predictions.bias.data[3] = math.nan

    run._train = poisoned
    with pytest.raises(TrainingError, match=r"^step 6: the loss on held-out text is nan; the last good .*0004$"):
        run.run()
    assert [p.name for p in run.checkpoints.complete()][-1] == "step-00000004"


def test_steps_left_out_by_a_loss_scale_are_no_error_until_it_is_used_up(tmp_path):
    """GradScaler on a CPU stands for the one on a GPU: the loop asks it alone."""
    run = make_run(make_settings(tmp_path, training__steps=6, training__save_every=3, training__log_every=3))
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    bias = run.model.cls.predictions.bias
    bias.register_hook(lambda gradient: gradient / 0.0 if run.step < 2 else gradient)  # an overflow
    before, train, moved = bias.detach().clone(), run._train, []

    def watched(*args):
        train(*args)
        moved.append(not torch.equal(bias, before))

    run._train = watched
    run.run()
    assert moved == [False, False, True, True, True, True]
    lines = [line for line in read_log(tmp_path) if line["kind"] == "train"]
    assert [line["skipped_steps"] for line in lines] == [2, 0]
    assert [line["loss_scale"] for line in lines] == [1024.0, 1024.0]
    assert all(math.isfinite(line["gradient_norm"]) and line["mlm_loss"] > 1 for line in lines)
    settings = make_settings(
        tmp_path / "hopeless", training__steps=40, training__log_every=5, training__evaluate_every=40
    )
    run = make_run(settings)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    poison(run, 2)
    with pytest.raises(TrainingError, match=r"step 3: .* is nan"):
        run.run()


def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match=r"training\.precision is 'fp16', which needs a CUDA device; cpu takes 'bf16'"):
        make_run(make_settings(tmp_path, training__precision="fp16"))


def test_bf16_multiplies_in_bf16_and_keeps_weights_in_fp32(tmp_path):
    logs = {}
    for precision in ("fp32", "bf16"):
        settings = make_settings(tmp_path / precision, training__precision=precision, training__log_every=1)
        run = make_run(settings, dropout=0.0)
        run.run()
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        logs[precision] = [line["mlm_loss"] for line in read_log(tmp_path / precision) if line["kind"] == "train"]
    assert logs["bf16"] != logs["fp32"]
    assert logs["bf16"] == pytest.approx(logs["fp32"], rel=5e-3)


def test_activation_checkpointing_changes_no_bit(tmp_path):
    states = []
    for name in (False, True):
        run = make_run(make_settings(tmp_path / str(name), training__activation_checkpointing=name))
        run.run()
        assert all(layer.gradient_checkpointing is name for layer in run.model.bert.encoder.layer)
        states.append(run.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def state_of(step, loss=None):
    return TrainingState(step=step, settings={}, data={}, scaler={}, unlogged=[], heldout_loss=loss)


def test_activation_checkpointing_keeps_a_part_of_the_activations(tmp_path):
    kept = {}
    for name in (False, True):
        run = make_run(make_settings(tmp_path / str(name), training__activation_checkpointing=name))
        weights = {parameter.data_ptr() for parameter in run.model.parameters()}
        held: dict[int, torch.Tensor] = {}  # the tensors themselves, so that no memory is used twice

        def hold(tensor, held=held):
            held[tensor.data_ptr()] = tensor
            return tensor

        micro_batch = run._micro_batch(next(iter(run.batches)))
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            run.replica.train()(micro_batch, micro_batch.counts)
        kept[name] = sum(tensor.nbytes for at, tensor in held.items() if at not in weights)
    assert kept[True] < kept[False] / 2


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_best=True)
    for step, loss in enumerate((5.0, 2.0, 3.0, None, 4.0), start=1):
        checkpoints.save(state_of(step, loss), lambda folder: (folder / "x").write_text("x"))
    assert [p.name for p in checkpoints.complete()] == ["step-00000002", "step-00000004", "step-00000005"]
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(100_000_000), lambda folder: None)  # nine digits, and still the newest
    assert [p.name for p in checkpoints.complete()] == ["step-100000000"]


def test_what_a_kill_left_is_removed_and_never_taken_for_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state_of(1), lambda folder: None)
    (tmp_path / ".incomplete-step-00000002").mkdir()
    (tmp_path / ".incomplete-step-00000002" / "model.safetensors").write_text("torn")
    assert [p.name for p in checkpoints.complete()] == ["step-00000001"]
    checkpoints.save(state_of(3), lambda folder: None)
    checkpoints = Checkpoints(tmp_path, keep=1)  # and one that a killed process had still to remove
    checkpoints.tidy()
    assert os.listdir(tmp_path) == ["step-00000003"]
    Checkpoints(tmp_path / "nothing", keep=1).tidy()


@pytest.mark.parametrize("where", ["file", "flush"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last(tmp_path, monkeypatch, where):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(1), lambda folder: (folder / "x").write_text("x"))

    def full(*args):
        raise OSError(28, "No space left on device")

    if where == "flush":
        monkeypatch.setattr(os, "fsync", full)
    write = full if where == "file" else (lambda folder: (folder / "x").write_text("x"))
    with pytest.raises(
        CheckpointError, match=r"step-00000002 cannot be written: No space left .*good checkpoint is .*0001$"
    ):
        checkpoints.save(state_of(2), write)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    log = Log(tmp_path, step=0, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": step})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "kin')  # torn by a kill
    log = Log(tmp_path, step=2, tensorboard=False)
    log.write(3, "train", {"loss": 30})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [(1, 1), (2, 2), (3, 30)]
    for damaged in ('{"step": 1', '{"kind": "train"}', "[1]"):
        (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 2}}\n')
        with pytest.raises(ValueError, match=r"log\.jsonl:2 is damaged: .* is no line of a log"):
            Log(tmp_path, step=2, tensorboard=False)


def test_tensorboard_events(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = make_settings(tmp_path, output__tensorboard=True)
    make_run(settings).run()
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = [line for line in read_log(tmp_path) if line["kind"] == "heldout"]
    scalars = events.Scalars("heldout/mlm_accuracy")
    assert [(s.step, s.value) for s in scalars] == [(x["step"], pytest.approx(x["mlm_accuracy"])) for x in lines]
    assert {"train/mlm_loss", "train/nsp_loss", "train/learning_rate"} <= set(events.Tags()["scalars"])


def test_without_tensorboard_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"fastbert-engine\[train\].*output\.tensorboard=false"):
        logs.Log(tmp_path, step=0, tensorboard=True)


class Terminal:
    def __init__(self, terminal):
        self.text, self.isatty = "", lambda: terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_the_progress_line():
    figures = {"loss": 3.0, "mlm_loss": 2.5, "nsp_loss": 0.5, "learning_rate": 1e-4}
    figures |= {"tokens_per_second": 12345.6, "mfu": 0.417}
    lines = Terminal(False)
    StatusLine(lines).show(progress_line(1200, 10000, figures, 7980))
    assert lines.text == (
        "fastbert: step 1,200/10,000, MLM loss 2.5000, NSP loss 0.5000, lr 1.00e-04, "
        "12,346 tokens/s, MFU 41.7%, 2 h 13 min left\n"
    )
    terminal = Terminal(True)
    progress = StatusLine(terminal)
    progress.show(progress_line(1, 10000, figures, 5))
    progress.show(progress_line(2, 10000, figures, 5))
    progress.say("something")
    progress.close()
    assert terminal.text.count("\n") == 1 and re.search(
        r"\r\x1b\[Kfastbert: step 2/.*\r\x1b\[Kfastbert: something\n$", terminal.text
    )
    assert (duration(9), duration(70), duration(3725)) == ("9 s", "1 min 10 s", "1 h 02 min")


def test_evaluations_and_dropout_do_not_touch_each_other(tmp_path):
    """How often a run is evaluated changes no weight."""
    states = []
    for every in (1, 100):
        run = make_run(make_settings(tmp_path / str(every), training__evaluate_every=every))
        run.run()
        states.append(run.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_evaluation_has_no_dropout(tmp_path):
    settings = make_settings(tmp_path, optimizer__lr=0.0)
    run = make_run(settings, dropout=0.5)
    run.run()
    losses = {line["loss"] for line in read_log(tmp_path) if line["kind"] == "heldout"}
    assert len(losses) == 1
    assert run.replica.training is False and len({line["loss"] for line in read_log(tmp_path)}) > 2


def test_a_process_without_a_held_out_sequence_is_left_out(tmp_path):
    whole = MadeUpBatches(99).batch(0)
    none = replace(
        whole,
        input_ids=whole.input_ids[:0],
        token_type_ids=whole.token_type_ids[:0],
        labels=whole.labels[:0],
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        max_seqlen=0,
        next_sentence_label=whole.next_sentence_label[:0],
    )
    losses = []
    for name, batches in (("a", [whole]), ("b", [whole, none])):
        run = make_run(make_settings(tmp_path / name, training__steps=2))
        run.heldout = lambda batches=batches: batches
        run.run()
        losses.append(read_log(tmp_path / name)[-1]["loss"])
    assert losses[0] == losses[1]
