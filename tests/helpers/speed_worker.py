"""Two processes whose trainings are measured; started by test_speed.py. Prints what rank 0 would log in each.

  speed_worker.py FILE

The ranks meet at the end of each step. In each case one thing is slow on rank 1: ``loader`` (a sample takes long to
read), ``forward`` (a forward pass does), or nothing (``even``: both are slow on both). Time is that of a clock which
these alone advance, so that a busy machine changes nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from llava_packing_tower.integrations.llava import speed
from llava_packing_tower.integrations.llava.speed import SpeedLog, TimedBatches

SLOW, FAST, STEPS = 0.2, 0.04, 4
now = 0.0
time.perf_counter = lambda: now


def spend(seconds: float) -> None:
    global now
    now += seconds


def meet() -> None:
    """The ranks go on together: when the last one is there."""
    global now
    latest = torch.tensor(now, dtype=torch.float64)
    dist.all_reduce(latest, dist.ReduceOp.MAX)
    now = latest.item()


class Samples(Dataset):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        spend(self.seconds / 2)  # two samples in a batch
        return torch.ones(3)


class Model(nn.Module):
    """As much of a LLaVA as is counted."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.config, self.layer = seconds, SimpleNamespace(), nn.Linear(3, 1)
        self.tower = nn.Linear(1, 1)

    def get_vision_tower(self) -> nn.Module:
        return self.tower

    def get_model(self) -> nn.Module:
        return self

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        spend(self.seconds)
        ones = torch.ones(len(batch), 7, dtype=torch.bool)
        speed._running.count_tokens(ones[:, :3], ones, None)
        return self.layer(batch).sum()


def train(rank: int, case: str) -> dict[str, float]:
    here = rank == 1
    read = {"loader": SLOW if here else 0.0, "forward": 0.0, "even": FAST}[case]
    model = Model({"loader": FAST, "forward": SLOW if here else FAST, "even": FAST}[case]).train()
    args = SimpleNamespace(device=torch.device("cpu"), fsdp="", output_dir="", mm_packing_peak_tflops=None)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None))
    trainer = SimpleNamespace(model=model, args=args, accelerator=accelerator)
    state = SimpleNamespace(global_step=0, max_steps=STEPS, is_world_process_zero=rank == 0, log_history=[])
    log = SpeedLog(trainer)
    loader = DataLoader(Samples(read), batch_size=2)
    meet()
    log.on_train_begin(args, state, None)
    for batch in TimedBatches(iter(loader), log.meter):
        log.on_step_begin(args, state, None)
        model(batch).backward()
        meet()
        state.global_step += 1
        log.on_step_end(args, state, SimpleNamespace(should_log=state.global_step == STEPS))
    everyone = [None, None]
    dist.all_gather_object(everyone, log.due)
    assert everyone[0]["rank_wait"] == everyone[1]["rank_wait"]
    return log.due


def main(file: str) -> None:
    other = os.fork()
    rank = 0 if other else 1
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {case: train(rank, case) for case in ("even", "loader", "forward")}
    dist.destroy_process_group()
    if rank == 1:
        os._exit(0)
    assert os.waitpid(other, 0)[1] == 0
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
