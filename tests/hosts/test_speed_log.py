"""The speed in the logs of LLaVA's own train script, with `import builder_patch` and nothing else of this package."""

from __future__ import annotations

import json
import re
import sys

import host_runs
import pytest
import warm

from llava_packing_tower.train.launcher import make_plan, to_argv

pytestmark = [host_runs.needs_host, pytest.mark.newest_long, pytest.mark.timeout(900)]
OWN = "import builder_patch; from llava.train.train import train; train()"


def test_an_own_script_logs_its_speed(tmp_path):
    config, output = host_runs.make_workspace(tmp_path), tmp_path / "llava_llama"
    words = [
        "--output_dir",
        str(output),
        "--bf16",
        "false",
        "--gradient_accumulation_steps",
        "2",
        "--disable_tqdm",
        "true",
    ]
    words += ["--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "2", "--attn_implementation", "null"]
    argv = to_argv(make_plan(str(config), words, num_processes=1).values)
    result = warm.execute([sys.executable, "-c", OWN, *argv], host_runs.environment(""))
    assert result.returncode == 0, result.stdout + result.stderr
    history = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        # Two optimizer steps of two micro-batches of two samples: all eight of an epoch, and the next eight.
        assert entry["visual_tokens_per_second"] / entry["samples_per_second"] == pytest.approx(64 * 7 / 8, rel=0.01)
        assert entry["rank_wait"] == 0 and 0 <= entry["data_wait"] < 1
    printed = [line for line in result.stdout.splitlines() if "'samples_per_second'" in line]
    assert len(printed) == 2  # by the trainer itself
    assert (output / "speed.csv").read_text().count("\n") == 3
    # What llava-packing train logs, although nobody has set up logging here.
    for line in ("training step: packed decoder: on (sdpa); head: ", "dealing: off (one process)", f"speed: {output}"):
        assert result.stderr.count(f"\n{line}") == 1, result.stderr


FULL = """
import torch
backward, done = torch.Tensor.backward, []
def full(self, *args, **kwargs):
    done.append(1)
    if len(done) == 3:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.")
    return backward(self, *args, **kwargs)
torch.Tensor.backward = full
"""


@pytest.mark.long
def test_out_of_memory_in_a_backward_pass_says_what_was_asked_for(tmp_path):
    config, output = host_runs.make_workspace(tmp_path), tmp_path / "llava_llama"
    words = ["--output_dir", str(output), "--bf16", "false", "--disable_tqdm", "true", "--attn_implementation", "null"]
    argv = to_argv(make_plan(str(config), words, num_processes=1).values)
    result = host_runs.execute([sys.executable, "-c", FULL + OWN, *argv], host_runs.environment(""), timeout=300)
    assert result.returncode == 1
    last = re.search(r"\nRuntimeError: (DefaultCPU.*)\n(.*)\n$", result.stderr)
    assert last, result.stderr
    counts = r"\d+ tokens of 2 samples, 128 of them visual, and 128 patches of 2 images\. "
    keys = r"Lower per_device_train_batch_size \(2\), mm_packing_batch_tokens \(not set\), model_max_length \(512\), "
    said = rf"The memory did not suffice for the backward pass of a training step with {counts}{keys}or set grad.*true"
    assert re.fullmatch(said, last[2]), last[2]
    assert "The above exception was the direct cause" in result.stderr
