"""Run by torchrun: the gradients of an embedder's first step on two processes, written to a file for each."""

import sys
from pathlib import Path

import torch

from fastbert.training.distributed import join
from fastbert.training.finetune.recipe import Recipe
from fastbert.training.finetune.settings import FinetuneSettings
from fastbert.training.finetune.trials import training_of
from fastbert.training.objective import Counts

model, folder = Path(sys.argv[1]), Path(sys.argv[2])
with join(torch.device("cpu")) as processes:
    data = folder / "data.jsonl"
    settings = FinetuneSettings(task="embedding", epochs=1, batch_size=24, mini_batch_tokens=30)
    recipe = Recipe.read(settings, model, {"train": data, "dev": data})
    run = training_of(recipe, recipe.fresh_model(model), folder / f"out-{processes.rank}", processes=processes)
    run.model.train()
    batches = run.next_step()
    loss = run.backward(batches, sum((batch.counts for batch in batches), Counts()))
    found = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    torch.save({**found, "loss": float(loss)}, folder / f"gradients-{processes.rank}.pt")
