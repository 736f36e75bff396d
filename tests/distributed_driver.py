"""One of torchrun's processes: runs `fastbert pretrain` in them all, then counts what their gradients cost.

    distributed_driver.py CONFIG FOLDER ARGS...     ARGS go to the command line

Writes FOLDER/counts-RANK.json: how often buckets of gradients travelled, by batches accumulated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from training_support import MadeUpBatches, make_run, make_settings

from fastbert.cli import main
from fastbert.training.distributed import join

config, folder, *arguments = sys.argv[1:]
torch.set_num_threads(1)
assert main(["pretrain", config, "--device", "cpu", *arguments]) == 0

counts = {}
with join(torch.device("cpu")) as processes:
    places = {"rank": processes.rank, "world_size": processes.world_size}
    for accumulate in (1, 3):
        settings = make_settings(Path(folder) / f"made-up-{accumulate}", training__accumulate=accumulate)
        run = make_run(settings, MadeUpBatches(**places), processes=processes)
        travelled = []

        def counted(state, bucket, travelled=travelled):
            travelled.append(bucket.index())
            return allreduce_hook(state, bucket)

        run.replica.register_comm_hook(None, counted)
        run.run()
        counts[accumulate] = len(travelled)
Path(folder, f"counts-{processes.rank}.json").write_text(json.dumps(counts))
