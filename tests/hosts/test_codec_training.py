"""Codec data from training to score: OneVision-Encoder's published samples and `positions_thw: codec`."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from clips import write_clip
from host_runs import NEEDS_NEXT, NEXT, environment, execute
from native_host import QUESTION, WORDS
from native_runs import make_workspace, train
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.long, *NEEDS_NEXT, pytest.mark.timeout(900)]
MOSAICS, SIDE = 8, 36
BUDGET = MOSAICS * 18 * 18
# A projector that merges 2 x 2 patches.
TOKENS = {"published": MOSAICS * SIDE * SIDE // 4, "codec": BUDGET // 4}

TASK = """
task: clips
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function clips.doc_to_visual
doc_to_text: question
doc_to_target: answer
doc_to_choice: [{words}]
process_results: !function clips.process_results
metric_list: [{{metric: loss, aggregation: mean, higher_is_better: false}}]
"""

FUNCTIONS = """
import ast

def doc_to_visual(doc):
    return [{clip!r}]

def process_results(doc, results):
    # lmms-eval hands pairs of loss and greediness over as text.
    return {{"loss": ast.literal_eval(results[0])[0] if isinstance(results[0], str) else results[0][0]}}
"""


def turns(images: int, answer: str) -> list[dict]:
    text = "<image>" * images + f"\n{QUESTION}"
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def write_published(folder: Path) -> Path:
    """A sample as upstream's tools write it: 8 JPEGs of 36 x 36 patches of 16 pixels, positions over 64 frames."""
    draw = np.random.default_rng(4)
    names = [f"mosaic_{number:03}.jpg" for number in range(MOSAICS)]
    for name in names:
        tiles = draw.integers(0, 256, (SIDE, SIDE, 3)).repeat(16, axis=0).repeat(16, axis=1)
        Image.fromarray(tiles.astype(np.uint8)).save(folder / name)
    times = np.sort(draw.integers(0, 64, MOSAICS * SIDE * SIDE))
    places = draw.integers(0, SIDE, (len(times), 2))
    np.save(folder / "positions_thw.npy", np.concatenate([times[:, None], places], axis=1).astype(np.int32))
    sample = {"id": "published", "image": names, "positions_thw": "positions_thw.npy"}
    (folder / "published.json").write_text(json.dumps([{**sample, "conversations": turns(MOSAICS, WORDS[0])}]))
    return folder / "published.json"


def sharpen(file: Path) -> None:
    """Weights with which patches look at some more than at others: random ones hardly ask where they stand."""
    tensors = load_file(file)
    save_file({n: t * 8 if "qkv" in n else t for n, t in tensors.items()}, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training on one sample of each kind, and one more step with the published positions in another order."""
    folder = tmp_path_factory.mktemp("codec")
    config = make_workspace(
        folder,
        data_path=str(folder / "data.yaml"),
        video_folder=str(folder),
        mm_projector_type="spatial_merge",
        mm_spatial_pool_stride=1,
        mm_packing_max_patches=64,
        mm_packing_video_max_patches=BUDGET,
        model_max_length=4096,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        bf16=False,
    )
    decoder = json.loads((folder / "llama_tiny" / "config.json").read_text())
    (folder / "llama_tiny" / "config.json").write_text(json.dumps({**decoder, "max_position_embeddings": 4096}))
    sharpen(folder / "vit_packing" / "model.safetensors")
    write_clip(folder / "clip.mp4", frames=40, width=336, height=192)
    clip = {"id": "clip", "video": "clip.mp4", "conversations": turns(1, WORDS[1])}
    (folder / "clips.json").write_text(json.dumps([clip]))
    datasets = [
        {"json_path": str(write_published(folder)), "sampling_strategy": "all"},
        {"json_path": str(folder / "clips.json"), "sampling_strategy": "all", "positions_thw": "codec"},
    ]
    (folder / "data.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    printed = train(config, NEXT)
    other = {**yaml.safe_load(config.read_text()), "output_dir": str(folder / "llava_llama_packing_other")}
    positions = np.load(folder / "positions_thw.npy")
    np.save(folder / "positions_thw.npy", positions[::-1])
    (folder / "other.yaml").write_text(yaml.safe_dump({**other, "max_steps": 1}))
    train(folder / "other.yaml", NEXT)
    return folder, printed


def logged(output: Path) -> list[dict]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_both_kinds_train_the_tower_with_all_their_patches(run):
    folder, printed = run
    output = folder / "llava_llama_packing_native"
    steps = logged(output)
    assert len(steps) == 2 and steps[1]["loss"] < steps[0]["loss"], printed
    rates = [step["visual_tokens_per_second"] / step["samples_per_second"] for step in steps]
    assert rates == pytest.approx([sum(TOKENS.values()) / 2] * 2, rel=1e-3)
    start = load_file(folder / "vit_packing" / "model.safetensors")
    tuned = load_file(output / "model.safetensors")
    moved = [name for name in start if not start[name].equal(tuned[f"model.vision_tower.vision_tower.{name}"])]
    assert len(moved) > 20


def test_the_positions_reach_the_tower_in_training(run):
    """The first step of two runs that differ in the order of the published positions alone."""
    folder, _ = run
    first, other = (logged(folder / f"llava_llama_packing_{name}")[0] for name in ("native", "other"))
    assert first["grad_norm"] != pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed: requirements/eval.txt")
def test_evaluation_asks_with_the_same_patches(run, tmp_path):
    folder, _ = run
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "clips.jsonl").write_text(json.dumps({"question": QUESTION, "answer": 1}) + "\n")
    (tasks / "clips.yaml").write_text(TASK.format(data=tasks / "clips.jsonl", words=", ".join(WORDS)))
    (tasks / "clips.py").write_text(FUNCTIONS.format(clip=str(folder / "clip.mp4")))
    checkpoint = tmp_path / "moved"
    shutil.copytree(folder / "llava_llama_packing_native", checkpoint)
    losses = {}
    for word in ("codec", ""):
        output = tmp_path / f"out_{word}"
        command = [sys.executable, "-m", "llava_packing_tower", "eval", str(checkpoint), "--tasks", "clips"]
        command += ["--include_path", str(tasks), "--output_path", str(output), "--log_samples"]
        command += ["--positions_thw", word] if word else []
        result = execute(command, {**environment(NEXT), "HF_DATASETS_OFFLINE": "1"}, timeout=400)
        assert result.returncode == 0, result.stdout + result.stderr
        (file,) = output.rglob("*_results.json")
        losses[word] = json.loads(file.read_text())["results"]["clips"]["loss,none"]
    # The mean loss of the first answer: frames are other patches than those that the codec tells of.
    assert all(0 < loss < 20 for loss in losses.values()) and abs(losses["codec"] - losses[""]) > 1e-3, losses
