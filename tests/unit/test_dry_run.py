"""The checks of data, ZeRO configurations and checkpoints by the launcher's own way in: make_plan and ``--dry_run``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from llava_packing_tower.cli.main import main
from llava_packing_tower.train import launcher
from llava_packing_tower.utils.errors import UsageError


def sample(image: object, *texts: str) -> dict:
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"id": "x", "image": image, "conversations": turns}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("[{", "is damaged"),
        ([], "found none"),
        ([{"id": "x"}], "sample x: no conversations"),
        ([sample("a.png", "<image> <image>", "b")], "x: 1 images, 2 <image>"),
        ([sample(["a.png", "a.png"], "<image>", "b")], "x: 2 images, 1 <image>"),
        ([sample("gone.png", "<image>", "b")], "sample x"),
        ([sample("text.png", "<image>", "b")], "cannot be read as an image"),
    ],
)
def test_data_is_checked_at_any_aspect_ratio(files, tmp_path, data, said):
    Image.new("RGB", (5, 4)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "text.png").write_text("no image")
    (tmp_path / "mine.json").write_text(data if isinstance(data, str) else json.dumps(data))
    for ratio in ("pad", "square"):
        words = ["--data_path", str(tmp_path / "mine.json"), "--image_aspect_ratio", ratio]
        with pytest.raises(UsageError, match=r"mine\.json") as caught:
            launcher.make_plan(files(), words, num_processes=1)
        assert said in str(caught.value)


SHARDS = tuple(f"global_step8/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(3))
STATES = "global_step8/mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("saved", "stage", "said"),
    [
        (("model.safetensors", "rng_state.pth"), None, "the weights alone"),
        (("optimizer.pt", "rng_state.pth"), None, "no state of the learning rate"),
        ((*SHARDS, STATES), 2, "saved by 3 processes, and this run has 1"),
        ((SHARDS[0], STATES), 3, "those of ZeRO-1 or 2, and this run asks for ZeRO-3"),
        ((SHARDS[0], STATES), None, "this run has no DeepSpeed"),
        (("optimizer.pt", "scheduler.pt", "rng_state.pth"), 2, "saved with no DeepSpeed"),
    ],
)
def test_no_run_is_said_to_go_on_that_cannot(files, tmp_path, capsys, saved, stage, said):
    checkpoint = tmp_path / "llava_out" / "checkpoint-8"
    for name in saved:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).touch()
    if STATES in saved:
        (checkpoint / "latest").write_text("global_step8")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 8, "max_steps": 20}')
    (checkpoint / "packing_complete.json").write_text("{}")
    file = Path(files())
    content = yaml.safe_load(file.read_text())
    content.pop("deepspeed", None)
    if stage:
        (tmp_path / "stage.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        content["deepspeed"] = str(tmp_path / "stage.json")
    file.write_text(yaml.safe_dump(content))
    words = ["--dry_run", "--num_processes", "1", "--output_dir", str(checkpoint.parent)]
    assert main(["train", str(file), *words]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and "checkpoint-8" in printed.err and "goes on" not in printed.out
