"""A YAML that `llava-packing train` accepts, and the files it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llava_packing_tower.integrations.llava.registry import find_host


def settings(folder: Path) -> dict:
    """What any run needs: the files in a folder, which need not exist yet, and how it trains."""
    return {
        "mm_vision_tower": f"packing:{folder / 'tower_packing'}",
        "model_name_or_path": str(folder / "llama"),
        "data_path": str(folder / "data.json"),
        "image_folder": str(folder / "images"),
        "output_dir": str(folder / "out"),
        "deepspeed": "zero.json",
        "mm_vision_select_layer": -2,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter",
        "bf16": True,
        "attn_implementation": "sdpa",  # LLaVA-NeXT's default needs flash-attn
        "learning_rate": "1e-4",
        "report_to": None,
    }


@pytest.fixture
def files(tmp_path):
    """A YAML that passes, and the files it names."""
    for name in ("tower_packing", "llama", "images"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llava_vit_packing"}' if "tower" in name else "{}")
    (tmp_path / "data.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}])
    )
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    content = {**settings(tmp_path), "num_train_epochs": 3}

    def write(**changes):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in {**content, **changes}.items() if v != "-"}))
        return file

    return write


def need_a_host() -> None:
    """Skip where there is none; it is not imported, for that prints."""
    try:
        find_host()
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
