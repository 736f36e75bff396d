"""`fastbert pretrain`: runs pre-training from its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastbert import native
from fastbert.checkpoint.hub import resolve_file
from fastbert.config import BertConfig
from fastbert.model import BertPreTrainedModel
from fastbert.precision import torch_device
from fastbert.progress import say
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.batches import PackedBatches, PretrainingBatch
from fastbert.training.distributed import Processes, join, local_rank
from fastbert.training.loop import Outcome, newest_checkpoint
from fastbert.training.masking import Masking
from fastbert.training.objective import Objective, model_class
from fastbert.training.pretraining import Pretraining
from fastbert.training.settings import Settings, SettingsError, load_settings
from fastbert.training.shards import Shards, read_index

# Peak TFLOP/s of dense products, (fp32 without TF32, bf16 and fp16), from NVIDIA's data sheets. The key is a part of
# the GPU's name; the first match applies.
GPU_PEAKS = {
    "GB200": (80, 2500),
    "B200": (80, 2250),
    "H200": (67, 989),
    "H100 PCIe": (51, 756),
    "H100 NVL": (60, 835),
    "H100": (67, 989),
    "A100": (19.5, 312),
    "A10G": (31, 70),
    "A10": (31, 125),
    "L40S": (92, 362),
    "L4": (30, 121),
    "V100": (15.7, 125),
    "T4": (8.1, 65),
    "RTX 4090": (83, 165),
    "RTX 3090": (36, 71),
}


_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json")


def run(args: argparse.Namespace) -> int:
    """Runs `fastbert pretrain`; returns the exit code."""
    return train(load_settings(args.config, args.set), args.device, resume=args.resume)


def train(
    settings: Settings,
    device: str | None,
    *,
    resume: bool,
    begin: Callable[[Settings, Tokenizer, Shards], BertPreTrainedModel] | None = None,
    objective: Callable[[BertPreTrainedModel], Objective] | None = None,
) -> int:
    """Runs the loop in all of torchrun's processes; returns the exit code.

    Args:
        begin: makes the initial model; None for fresh_model.
        objective: makes the objective from the model on its device; None for the losses of its own heads.
    """
    place = torch.device(_device(device))
    with join(place) as processes:
        outcome = _pretrain(settings, place, processes, begin or fresh_model, objective, resume=resume)
    if processes.first:
        say(f"step {outcome.step:,}, checkpoint {outcome.checkpoint}")
    return outcome.exit_code()


def _pretrain(
    settings: Settings,
    device: torch.device,
    processes: Processes,
    begin: Callable[[Settings, Tokenizer, Shards], BertPreTrainedModel],
    objective: Callable[[BertPreTrainedModel], Objective] | None,
    *,
    resume: bool,
) -> Outcome:
    newest = newest_checkpoint(Path(settings.output.folder), "output.folder", resume=resume)
    processes.wait()  # until all have read the folder, before one writes
    shards = Shards(settings.data.shards)
    tokenizer = shards.tokenizer
    if newest is None:
        model = begin(settings, tokenizer, shards)
    else:
        kind = model_class(settings.training.objective, BertConfig.from_pretrained(newest))
        model = kind.from_pretrained(newest)
    shards.check_model(model.config)
    masking = Masking(settings.data.mask_probability, whole_words=settings.data.whole_words)
    places = {"rank": processes.rank, "world_size": processes.world_size}
    options: dict[str, Any] = {"tokens_per_batch": settings.data.tokens_per_batch, "masking": masking, **places}
    trainer = Pretraining(
        settings,
        model,
        tokenizer,
        PackedBatches(shards, seed=settings.training.seed, **options),
        _heldout(settings, model.config, options),
        device=device,
        processes=processes,
        peak_flops=peak_flops(settings, device),
        objective=None if objective is None else objective(model.to(device)),
    )
    if newest is not None:
        trainer.resume(newest)
        if processes.first:
            say(f"resuming from {newest}: {trainer.step:,} of {settings.training.steps:,} steps done")
            if trainer.step >= settings.training.steps:
                say(
                    f"the run is finished; more steps prolong it, as in --resume --set "
                    f"training.steps={2 * trainer.step} --set schedule.total_steps={2 * trainer.step}"
                )
    return trainer.run()


def _heldout(settings: Settings, config: BertConfig, options: dict) -> Callable[[], Iterator[PretrainingBatch]] | None:
    """A function that makes the same batches for each evaluation; None without held-out text or evaluations."""
    folder = Path(settings.data.heldout or settings.data.shards)
    if not settings.data.heldout_batches or (
        settings.data.heldout is None and "held_out" not in read_index(folder)["splits"]
    ):
        return None
    shards = Shards(folder, "held_out")
    shards.check_model(config)
    return lambda: islice(PackedBatches(shards, seed=0, epochs=1, **options), settings.data.heldout_batches)


def fresh_model(settings: Settings, tokenizer: Tokenizer, shards: Shards) -> BertPreTrainedModel:
    """The initial model, in float32 on the host, deterministic for a seed.

    Raises:
        ValueError: its vocabulary or sizes do not fit the shards.
    """
    wanted, training = settings.model, settings.training
    overrides = wanted.sizes()
    if training.dropout is not None:
        overrides |= {"hidden_dropout_prob": training.dropout, "attention_probs_dropout_prob": training.dropout}
    torch.manual_seed(training.seed)
    if wanted.checkpoint is not None:
        config = BertConfig.from_pretrained(wanted.checkpoint, **overrides)
        if any(resolve_file(wanted.checkpoint, name, required=False) for name in _TOKENIZERS):
            shards.check_model(config, AutoTokenizer.from_pretrained(wanted.checkpoint))
        kind = model_class(training.objective, config)
        return kind.from_pretrained(wanted.checkpoint, dtype=torch.float32, **overrides)
    if wanted.config is not None:
        config = BertConfig.from_pretrained(_config_folder(wanted.config), **overrides)
    else:
        config = BertConfig(
            **{"vocab_size": shards.vocabulary.size, "pad_token_id": tokenizer.pad_token_id, **overrides}
        )
    return model_class(training.objective, config)(config)


def _config_folder(path: str) -> Path:
    """The folder of a config.json, from the path of the file or of the folder."""
    file = Path(path)
    if file.is_file() and file.name != "config.json":
        raise SettingsError(f"model.config is {path!r}; it must be a file called config.json, or the folder with it")
    return file.parent if file.is_file() else file


def peak_flops(settings: Settings, device: torch.device) -> float | None:
    """Peak FLOP/s of one device in the run's precision: from the settings, a measurement (CPU) or the GPU's name."""
    half = settings.training.precision != "fp32"
    if settings.training.peak_tflops is not None:
        return settings.training.peak_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peaks for part, peaks in GPU_PEAKS.items() if part in name), None)
        return None if known is None else known[half] * 1e12
    if device.type != "cpu" or native.available() is not None:
        return None
    # If bf16 products are slower than fp32 ones, the peak is that of fp32.
    kinds = ("bf16", "fp32") if half else ("fp32",)
    return max(native.peak(kind, native.isa(), torch.get_num_threads()) for kind in kinds)


def _device(name: str | None) -> str:
    """The device of that name; with several GPUs, each of torchrun's processes uses its own."""
    number, device = local_rank(), torch_device(name)
    return f"cuda:{number}" if device == "cuda" and number is not None else device
