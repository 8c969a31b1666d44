"""A checkpoint and an interrupted run that version 34c8e29 wrote: the one is scored as it was then, the other resumes
and ends with the weights that the run had when it was not interrupted."""

import json
import shutil
import sys
from pathlib import Path

import host_runs
import pytest
import torch
import warm
from conftest import only_four
from host_runs import needs_host
from numerics import digest, rounding
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "made_before_run"
MADE = json.loads((FOLDER / "made.json").read_text())
LOSSES = """
import json, sys
from pathlib import Path
from PIL import Image
from llava_packing_tower.integrations.llava import batched_inference, install
from llava_packing_tower.integrations.llava.inference import load_checkpoint
install.apply()
folder = Path(sys.argv[1])
loaded = load_checkpoint(folder / "finished")
loaded.model.float()
questions = [
    batched_inference.prepare(loaded, sys.argv[2], [Image.open(folder / "images" / f"{n}.png")], "v1", answer=answer)
    for n, answer in ((0, "cat"), (5, "moon"), (6, "a cup"))
]
print(json.dumps([loss for loss, _ in batched_inference.losses(loaded, questions)]))
"""


@pytest.fixture
def run(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "run")
    return tmp_path / "run"


def execute(command, folder):
    env = {**host_runs.environment(""), "PYTHONPATH": str(host_runs.REPOSITORY)}
    run = warm.execute if command[1] == "-c" else host_runs.execute
    result = run(command, env, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_host
@pytest.mark.newest_long
@pytest.mark.timeout(900)
def test_the_checkpoint_has_the_losses_that_it_had(run):
    found = json.loads(execute([sys.executable, "-c", LOSSES, str(run), host_runs.QUESTION], run).splitlines()[-1])
    assert found == pytest.approx(MADE["losses"], rel=1e-5)


@needs_host
@only_four  # the schedule and the order of the samples are those of that transformers
@pytest.mark.timeout(900)
@pytest.mark.parametrize("step", ["as it was", pytest.param("packed", marks=pytest.mark.long)])
def test_the_interrupted_run_resumes_to_the_same_weights(run, step):
    """Bit for bit with the padded training step, which it had; to rounding with the packed one.

    The bits are those that 34c8e29 itself resumed to, on a machine that rounds as this one does (made.json: ends).
    """
    (run / "interrupted").rename(run / "llava_run")
    command = [sys.executable, "-m", "llava_packing_tower", "train", "config.yaml", "--num_processes", "1"]
    if step == "as it was":
        command += ["--mm_packing_decoder", "false", "--mm_packing_full_logits", "true"]
    printed = execute(command, run)
    assert "checkpoint-2" in printed and "step 1/4" not in printed
    for number in (3, 4):
        assert f"step {number}/4  loss {MADE['losses_of_steps'][number - 1]:.4f}" in printed
    want, got = (load_file(run / name / "model.safetensors") for name in ("finished", "llava_run"))
    assert want.keys() == got.keys()
    before = MADE["ends"].get(rounding())
    if before is not None and step == "as it was":
        assert digest(got) == before
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=5e-6 if step == "as it was" else 2e-4, rtol=0, msg=name)
