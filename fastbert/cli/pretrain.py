"""`fastbert pretrain`: runs pre-training from its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastbert import native
from fastbert.checkpoint.hub import resolve_file
from fastbert.config import BertConfig
from fastbert.model import BertPreTrainedModel
from fastbert.model.heads import ModelForMaskedLM
from fastbert.progress import say
from fastbert.tokenizer.auto import AutoTokenizer
from fastbert.tokenizer.tokenizer import Tokenizer
from fastbert.training.batches import PackedBatches, PretrainingBatch
from fastbert.training.distributed import Processes, device_of, join
from fastbert.training.loop import Outcome, newest_checkpoint
from fastbert.training.masking import Masking
from fastbert.training.mixture import Mixture
from fastbert.training.objective import Objective, model_class
from fastbert.training.pretraining import Pretraining
from fastbert.training.replaced_tokens import ReplacedTokens, generator_config
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
    place = torch.device(device_of(device))
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
    sources = [Shards(folder) for folder in (settings.data.shards, *settings.data.more_shards)]
    shards = sources[0]
    for other in sources[1:]:
        check_same_vocabulary(shards, other)
    tokenizer = shards.tokenizer
    if newest is None:
        model = begin(settings, tokenizer, shards)
    else:
        kind = model_class(settings.training.objective, BertConfig.from_pretrained(newest))
        model = kind.from_pretrained(newest)
    for source in sources:
        source.check_model(model.config)
    masking = masking_of(settings)
    places = {"rank": processes.rank, "world_size": processes.world_size}
    options: dict[str, Any] = {"tokens_per_batch": settings.data.tokens_per_batch, "masking": masking, **places}
    trainer = Pretraining(
        settings,
        model,
        tokenizer,
        batches_of(settings, sources, options),
        _heldout(settings, model.config, options),
        device=device,
        processes=processes,
        peak_flops=peak_flops(settings, device),
        objective=_objective(settings, model.to(device), objective),
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


def _objective(
    settings: Settings, model: BertPreTrainedModel, make: Callable[[BertPreTrainedModel], Objective] | None
) -> Objective | None:
    """The objective of a model on its device; None for the losses of its own heads."""
    if make is not None:
        return make(model)
    if settings.training.objective != "rtd":
        return None
    torch.manual_seed(settings.training.seed + 1)
    generator = ModelForMaskedLM(generator_config(model.config, settings.model.generator_share))
    return ReplacedTokens(model, generator.to(model.device), settings.training.rtd_weight)


def masking_of(settings: Settings) -> Masking:
    """How tokens are masked; RTD's generator sees [MASK] for all that are chosen."""
    data = settings.data
    shares = {"mask_share": 1.0, "random_share": 0.0} if settings.training.objective == "rtd" else {}
    return Masking(data.mask_probability, whole_words=data.whole_words, span_length=data.span_length, **shares)


def batches_of(settings: Settings, sources: Sequence[Shards], options: dict[str, Any]) -> PackedBatches | Mixture:
    """The batches of a run, from one folder of shards or several."""
    data, seed = settings.data, settings.training.seed
    made = [PackedBatches(shards, seed=seed + i, **options) for i, shards in enumerate(sources)]
    if data.batch_start is not None:
        for batches in made:
            batches.check_tokens("data.batch_start", data.batch_start)
    if len(made) == 1:
        return made[0]
    weights = data.weights or tuple(float(shards.counts.tokens) for shards in sources)
    return Mixture(made, data.tokens_per_batch, weights)


def check_same_vocabulary(first: Shards, other: Shards) -> None:
    """Raises ValueError if the shards of two folders have different vocabularies."""
    if first.vocabulary != other.vocabulary:
        raise ValueError(f"{other.folder} was prepared with another vocabulary than {first.folder}")


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
