"""A BERT-large training step on a GPU against transformers', its peak memory, and whether it repeats bit for bit.

    python benchmarks/bench_gpu_training.py
    python benchmarks/bench_gpu_training.py --subjects determinism

Masked language modelling on rows of 512 tokens without pads, 15 % of them labelled; weights, gradients and AdamW's
state in bf16, dropout 0.1. First each provider's gradients without dropout are held to those of transformers
eager in fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gpu_suite
import machine
import torch
import torch.nn.functional as F
from bench_encoder import RANDOM
from encoders import backends_in_use, quiet_transformers
from gpu_suite import Settings, Work, compiled, joined, sizes
from harness import Case, Gate, Prepared, Provider, Unsupported, exact_gate, twice_eager_gate
from peers.torch_runtime import compile_layers
from torch import Tensor, nn
from workload import SEED, training_flops

import fastbert

STEP = (64, 512)  # rows x tokens
CHECKED_ROWS = 8  # of them whose gradients are held to fp32
DETERMINISM = (8, 512)
LABELLED = 0.15
DROPOUT = 0.1
# A first loss without dropout is ln(V) and little more; with dropout it is off by less than this.
LOSS_TOLERANCE = 0.05


@dataclass(frozen=True)
class Texts:
    """Rows of ids without pads, and their labels: -100 where none is asked."""

    ids: Tensor  # (B, S)
    labels: Tensor  # (B, S)

    def first(self, rows: int) -> Texts:
        return Texts(self.ids[:rows], self.labels[:rows])


def random_texts(vocab_size: int, shape: tuple[int, int], device: torch.device) -> Texts:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(1, vocab_size, shape, generator=generator)
    labelled = torch.rand(shape, generator=generator) < LABELLED
    return Texts(ids.to(device), torch.where(labelled, ids, -100).to(device))


# A model and the function from texts to its loss.
Trained = tuple[nn.Module, Callable[[Texts], Tensor]]


class Training:
    """One model's folder, and how each provider trains it."""

    def __init__(self, settings: Settings, config: Any, folder: Path) -> None:
        self.settings, self.config, self.folder = settings, config, folder

    def fastbert(self, dtype: torch.dtype = torch.bfloat16, *, recompute: bool = False) -> Trained:
        model = fastbert.BertForMaskedLM.from_pretrained(self.folder, dtype=dtype, device=self.settings.device)
        if recompute:
            if not hasattr(model, "recompute_activations"):
                raise Unsupported("this fastbert has no recompute_activations()")
            model.recompute_activations(True)
        return model, lambda texts: model(input_ids=texts.ids, labels=texts.labels, output_logits=False).loss

    def transformers(self, attention: str, dtype: torch.dtype = torch.bfloat16) -> Trained:
        from transformers import BertForMaskedLM

        model = BertForMaskedLM.from_pretrained(self.folder, dtype=dtype, attn_implementation=attention)
        model.to(self.settings.device)
        return model, lambda texts: model(input_ids=texts.ids, labels=texts.labels).loss

    def compiled(self) -> Trained:
        """The layers compiled once for all, embeddings and head with its loss each on their own."""
        model, _ = self.transformers("sdpa")
        device = self.settings.device
        gpu_suite.allow_compiling()
        compile_layers(model, backend=gpu_suite.compiler(device))
        model.bert.embeddings.compile(dynamic=False, backend=gpu_suite.compiler(device))

        def loss_of(states: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(model.cls(states).flatten(0, 1).float(), labels.flatten())

        head = compiled(loss_of, device)
        return model, lambda texts: head(model.bert(input_ids=texts.ids).last_hidden_state, texts.labels)

    def gradients(self, trained: Trained, texts: Texts) -> tuple[float, list[Tensor]]:
        """The loss without dropout, and the gradients of the first and last layer's weights and the head's."""
        model, loss_of = trained
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # compiling for this alone would take half a minute
            loss = loss_of(texts)
            loss.backward()
        last = self.config.num_hidden_layers - 1
        wanted = (".layer.0.", f".layer.{last}.", ".transform.")
        named = sorted(
            (n, p) for n, p in model.named_parameters() if n.endswith("weight") and any(w in n for w in wanted)
        )
        found = [p.grad for _, p in named]
        model.zero_grad(set_to_none=True)
        return loss.item(), found

    def step(self, make: Callable[[], Trained], texts: Texts, scales: list[float], loss: float) -> Prepared:
        trained = make()
        model, loss_of = trained
        first = joined(self.gradients(trained, texts.first(CHECKED_ROWS))[1], scales)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def run() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(texts)
            loss.backward()
            optimizer.step()
            return loss.detach()

        def result(reached: Tensor) -> Tensor:
            if not abs(reached.item() / loss - 1) <= LOSS_TOLERANCE:
                raise ValueError(f"loss {reached.item():.3f} with dropout, {loss:.3f} by fp32 without")
            return first

        def resident() -> float:
            states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
            held = [t for p in model.parameters() for t in (p, p.grad) if t is not None] + states
            return sum(t.numel() * t.element_size() for t in held if t.device == texts.ids.device) / 1e6

        ours = isinstance(model, fastbert.BertForMaskedLM)
        return Prepared(run, result, backends_in_use(model) if ours else "", resident)


def with_model(name: str, subject: Callable[[Settings, Training], Iterator[Work]]) -> gpu_suite.Subject:
    def run(settings: Settings) -> Iterator[Work]:
        from transformers import BertConfig, BertForMaskedLM

        quiet_transformers()
        _, sizes = RANDOM[settings.pick(name, "bert-tiny")]
        config = BertConfig(**sizes, hidden_dropout_prob=DROPOUT, attention_probs_dropout_prob=DROPOUT)
        with TemporaryDirectory() as folder:
            torch.manual_seed(SEED)
            BertForMaskedLM(config).save_pretrained(folder)
            yield from subject(settings, Training(settings, config, Path(folder)))

    return run


def training_step(settings: Settings, training: Training) -> Iterator[Work]:
    rows, length = settings.pick(STEP, (4, 16))
    config = training.config
    texts = random_texts(config.vocab_size, (rows, length), settings.device)
    checked = texts.first(CHECKED_ROWS)
    loss, exact = training.gradients(training.transformers("eager", torch.float32), checked)
    scales = sizes(exact)
    expected = joined(exact, scales)
    _, eager = training.gradients(training.transformers("eager"), checked)
    allowed = twice_eager_gate(expected, joined(eager, scales))
    # The root mean square alone: which of millions of gradients is the furthest off is chance.
    gate = Gate(expected, float("inf"), allowed.rms_error)
    del exact, eager
    case = Case(
        op="training step",
        model=settings.pick("bert-large", "bert-tiny"),
        name="packed rows",
        shape=f"{rows}x{length}",
        fill=1.0,
        tokens=rows * length,
        texts=rows,
        flops=training_flops(config, [length] * rows, int((texts.labels >= 0).sum())),
        mode="step",
        min_rounds=8,
    )
    makers = {
        "fastbert": training.fastbert,
        "fastbert-recompute": partial(training.fastbert, recompute=True),
        "transformers-sdpa": partial(training.transformers, "sdpa"),
        "torch-compile-layers": training.compiled,
    }
    providers = [
        Provider(name, lambda _, m=make: training.step(m, texts, scales, loss), "bf16") for name, make in makers.items()
    ]
    yield Work(case, providers, lambda _: gate, machine.time_latency)


def determinism(settings: Settings, training: Training) -> Iterator[Work]:
    """Steps from the same weights and seed: how many numbers of the loss and the gradients differ. None may.

    Another seed has to give others, or dropout was not on.
    """
    texts = random_texts(training.config.vocab_size, settings.pick(DETERMINISM, (2, 16)), settings.device)

    def prepare(case: Case) -> Prepared:
        model, loss_of = training.fastbert()
        model.train()

        def run(seed: int = SEED) -> list[Tensor]:
            torch.manual_seed(seed)
            model.zero_grad(set_to_none=True)
            loss = loss_of(texts)
            loss.backward()
            return [loss.detach(), *(p.grad for p in model.parameters())]

        def result(first: list[Tensor]) -> Tensor:
            def differing(second: list[Tensor]) -> int:
                return sum(int(torch.count_nonzero(a != b)) for a, b in zip(first, second, strict=True))

            return torch.tensor([differing(run()), float(not differing(run(SEED + 1)))])

        return Prepared(run, result, backends_in_use(model))

    rows, length = texts.ids.shape
    case = Case(
        op="determinism",
        model=settings.pick("bert-base", "bert-tiny"),
        name="dropout 0.1",
        shape=f"{rows}x{length}",
        fill=1.0,
        tokens=texts.ids.numel(),
        flops=training_flops(training.config, [length] * rows, int((texts.labels >= 0).sum())),
        mode="step",
    )
    providers = [Provider("fastbert", prepare, "bf16")]
    yield Work(case, providers, lambda _: exact_gate(torch.zeros(2), 0.0))


SUBJECTS = {
    "step": with_model("bert-large", training_step),
    "determinism": with_model("bert-base", determinism),
}


def main(arguments: list[str] | None = None) -> int:
    return gpu_suite.main(arguments, __doc__, "bench_gpu_training", SUBJECTS)


if __name__ == "__main__":
    sys.exit(main())
