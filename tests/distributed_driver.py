"""One of torchrun's processes: runs `fastbert pretrain`, once or more, and counts how often gradients travel.

    distributed_driver.py FOLDER ARGS... [-- ARGS...]     ARGS go to the command line, a run each

Writes FOLDER/travelled-RANK.json, for each run: the numbers of DDP's buckets of gradients, in the order in which they
were summed up, and of FSDP's, how many there were; and FOLDER/left-RANK.json, whether the group of all processes
is still there when they have parted, and the names of the threads that are.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import fastbert.cli.pretrain
from fastbert.cli.main import main
from fastbert.training.distributed import Processes, join

folder, *arguments = sys.argv[1:]
travelled: list[dict] = []
replicate = Processes.replicate
SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"  # before 2.13
reduce_scatter = getattr(dist, SCATTER)


def summed_up(state, bucket):
    travelled[-1]["buckets"].append(bucket.index())
    return allreduce_hook(state, bucket)


def counted(processes, module):
    replica = replicate(processes, module)
    replica.register_comm_hook(None, summed_up)
    return replica


def counted_reduce_scatter(*args, **kwargs):
    travelled[-1]["shards"] += 1
    return reduce_scatter(*args, **kwargs)


Processes.replicate = counted
setattr(dist, SCATTER, counted_reduce_scatter)
torch.set_num_threads(1)
code = 0
with join(torch.device("cpu")) as processes:
    group = weakref.ref(dist.group.WORLD)
    fastbert.cli.pretrain.join = lambda device: contextlib.nullcontext(processes)  # for all runs, one rendezvous
    for separator, run in itertools.groupby(arguments, lambda argument: argument == "--"):
        if not separator:
            travelled.append({"buckets": [], "shards": 0})
            code = code or main(["pretrain", *run])
Path(folder, f"travelled-{os.environ['RANK']}.json").write_text(json.dumps(travelled))
names = sorted(comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm"))
left = {"group": group() is not None, "threads": names}
Path(folder, f"left-{os.environ['RANK']}.json").write_text(json.dumps(left))
sys.exit(code)
