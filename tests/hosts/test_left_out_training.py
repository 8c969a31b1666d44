"""Training of real hosts over samples that cannot be read: two ranks, workers, batches of nothing else; strict runs."""

from __future__ import annotations

import json
import os

import host_runs
import pytest
from native_data_checks import write_video

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = [host_runs.needs_host, pytest.mark.newest, pytest.mark.timeout(900)]


def spoil(folder, next_dir) -> list[str]:
    """Five or six of eight samples: three in a row, the last one, a pipe, a video. Returns their ids."""
    images, data = folder / "images", json.loads((folder / "data.json").read_text())
    for name in ("1.png", "2.png", "6.png"):
        (images / name).write_bytes((images / name).read_bytes()[:2000])
    (images / "3.png").unlink()
    os.mkfifo(images / "3.png")
    bad = ["1.png", "2.png", "3.png", "6.png", "cut.png"]
    data[-1] = {**data[0], "id": "cut.png", "image": "6.png"}
    if next_dir:
        whole = images / "whole.mp4"
        write_video(whole, 6)
        (images / "cut.mp4").write_bytes(whole.read_bytes()[:700])
        data[4] = {**{k: v for k, v in data[4].items() if k != "image"}, "id": "cut.mp4", "video": "cut.mp4"}
        bad.append("cut.mp4")
    (folder / "data.json").write_text(json.dumps(data))
    return sorted(bad)


@pytest.mark.parametrize("next_dir", host_runs.HOSTS)
def test_every_rank_makes_every_step(tmp_path, next_dir):
    config = host_runs.make_workspace(tmp_path)
    bad, output = spoil(tmp_path, next_dir), tmp_path / "llava_llama_packing"
    words = ["--per_device_train_batch_size", "1", "--dataloader_num_workers", "2", "--save_strategy", "steps"]
    words += ["--save_steps", "2"]
    if next_dir:
        words += ["--deepspeed", "configs/zero3.json", "--video_folder", str(tmp_path / "images")]
    else:  # the samples of a step are dealt
        words += ["--deepspeed", "configs/zero2.json", "--gradient_accumulation_steps", "2", "--max_steps", "2"]
    printed = host_runs.train(config, output, next_dir, *words)
    assert ("step 4/4" if next_dir else "step 2/2") in printed and "nan" not in printed.lower()
    assert f"left out: {len(bad)} samples that cannot be read" in printed
    assert "1 of 8 files cannot be read: their samples are left out" in printed  # the pipe, before training
    found = json.loads((output / "left_out_samples.json").read_text())
    assert sorted(entry["sample"] for entry in found) == bad
    for entry in found:
        assert entry["file"].startswith(str(tmp_path / "images")) and entry["file"] in entry["reason"]
        assert f"sample {entry['sample']}: " in printed


@pytest.mark.long  # tests/helpers/left_out_checks.py has the same in a process
@pytest.mark.parametrize("next_dir", host_runs.HOSTS)
def test_strict_ends_the_run_by_name(tmp_path, next_dir):
    config = host_runs.make_workspace(tmp_path)
    image = tmp_path / "images" / "5.png"
    image.write_bytes(image.read_bytes()[:2000])
    words = ["--strict", "--dataloader_num_workers", "1"]
    command = host_runs.train_command(config, tmp_path / "llava_llama_packing", *words, processes=1)
    done = host_runs.execute(command, host_runs.environment(next_dir))
    assert done.returncode != 0 and f"sample 5.png: {image} cannot be read as an image" in done.stderr
    assert not (tmp_path / "llava_llama_packing" / "config.json").exists()
