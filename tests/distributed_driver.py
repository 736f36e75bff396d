"""One of torchrun's processes: runs `fastbert pretrain` and counts how often gradients travel.

    distributed_driver.py FOLDER ARGS...     ARGS go to the command line

Writes FOLDER/travelled-RANK.json: the numbers of the buckets of gradients, in the order in which they were summed up.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from fastbert.cli import main
from fastbert.training.distributed import Processes

folder, *arguments = sys.argv[1:]
travelled: list[int] = []
replicate = Processes.replicate


def summed_up(state, bucket):
    travelled.append(bucket.index())
    return allreduce_hook(state, bucket)


def counted(processes, module):
    replica = replicate(processes, module)
    replica.register_comm_hook(None, summed_up)
    return replica


Processes.replicate = counted
torch.set_num_threads(1)
code = main(["pretrain", *arguments])
Path(folder, f"travelled-{os.environ['RANK']}.json").write_text(json.dumps(travelled))
sys.exit(code)
