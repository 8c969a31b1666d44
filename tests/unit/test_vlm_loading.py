"""What is read of a whole VLM, from disk and from the hub, and how much memory that takes."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from families import VLM_FAMILIES
from safetensors.torch import load_file, save_file

from llava_packing_tower import Qwen3VLVisionPacking
from llava_packing_tower.checkpoint.hub import resolve_folder
from llava_packing_tower.checkpoint.weights import WeightFiles
from llava_packing_tower.cli.main import main
from llava_packing_tower.convert.hf_reference import IN_TRANSFORMERS
from llava_packing_tower.models.registry import part_of
from llava_packing_tower.towers.saved_tower import tower_fingerprint
from llava_packing_tower.utils.files import read_json

NAMES = list(VLM_FAMILIES)
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]

# A VLM of 8 GB in four shards, of which one holds the tower beside a part of the decoder: zeros that take no place.
MEASURE = """
import json, sys
from pathlib import Path
import torch
from llava_packing_tower import Qwen3VLVisionPacking
from llava_packing_tower.checkpoint import weights

folder, read = Path(sys.argv[1]), {"bytes": 0}
get, opened = weights.WeightFiles.__getitem__, weights.open_weights

def counted_get(self, key):
    tensor = get(self, key)
    read["bytes"] += tensor.numel() * tensor.element_size()
    return tensor

def counted_open(path):
    with path.open("rb") as stream:
        read["bytes"] += 8 + int.from_bytes(stream.read(8), "little")
    return opened(path)

weights.WeightFiles.__getitem__, weights.open_weights = counted_get, counted_open

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
Qwen3VLVisionPacking(Qwen3VLVisionPacking.config_class(**small))  # what is imported and cached once
read["bytes"], before = 0, peak()
model = Qwen3VLVisionPacking.from_pretrained(folder, dtype="auto")
tower = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"memory": peak() - before, "read": read["bytes"], "tower": tower}))
"""


def sparse_shard(file, tensors, size):
    """A safetensors file of ``size`` bytes, whose tensors (bfloat16 shapes) are holes."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        end = start + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    header["model.language_model.filler." + file.stem] = {
        **{"dtype": "BF16", "shape": [(size - start) // 2]},
        **{"data_offsets": [start, start + (size - start) // 2 * 2]},
    }
    content = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        stream.truncate(8 + len(content) + (size - start) // 2 * 2 + start)
    return [name for name in header if name != "__metadata__"]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_eight_gigabytes_and_a_tower(tmp_path):
    vision = dict(model_type="qwen3_vl", depth=8, hidden_size=1024, intermediate_size=4096, num_heads=16, in_channels=3)
    vision |= dict(patch_size=16, spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=2304)
    vision |= dict(out_hidden_size=256, deepstack_visual_indexes=[2], hidden_act="gelu_pytorch_tanh")
    config = {"model_type": "qwen3_vl", "vision_config": vision, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    d, wide, cell = 1024, 4096, 4096
    tower = {"patch_embed.proj.weight": (d, 3, 2, 16, 16), "patch_embed.proj.bias": (d,), "pos_embed.weight": (2304, d)}
    for i in range(8):
        for name, shape in {
            **{"norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,)},
            **{"attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,), "attn.proj.weight": (d, d)},
            **{"attn.proj.bias": (d,), "mlp.linear_fc1.weight": (wide, d), "mlp.linear_fc1.bias": (wide,)},
            **{"mlp.linear_fc2.weight": (d, wide), "mlp.linear_fc2.bias": (d,)},
        }.items():
            tower[f"blocks.{i}.{name}"] = shape
    for merger, width in (("merger", d), ("deepstack_merger_list.0", cell)):
        tower |= {f"{merger}.norm.weight": (width,), f"{merger}.linear_fc1.weight": (cell, cell)}
    weight_map = {}
    for number in range(4):
        file = tmp_path / f"model-{number + 1:05d}-of-00004.safetensors"
        tensors = {f"model.visual.{name}": shape for name, shape in tower.items()} if number == 2 else {}
        weight_map |= dict.fromkeys(sparse_shard(file, tensors, 2 << 30), file.name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 8 << 30
    result = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["tower"] > 200e6
    assert found["memory"] < 1.5 * found["tower"], found
    assert found["read"] < 1.2 * found["tower"], found


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_is_hashed_without_the_rest(tmp_path, golden, name):
    """A frozen tower is told by its own tensors: another decoder changes nothing, another tower does."""
    for file in (golden / name).iterdir():
        if file.name not in (SHARDS[0], SHARDS[2]):  # the decoder's are not there at all
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert tower_fingerprint(tmp_path) == tower_fingerprint(golden / name)
    tensors = load_file(tmp_path / SHARDS[1])
    key = next(key for key in tensors if key.endswith(("norm1.weight", "ln_1.weight")))
    save_file({**tensors, key: tensors[key] + 1}, tmp_path / SHARDS[1])
    assert tower_fingerprint(tmp_path) != tower_fingerprint(golden / name)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_shards_of_the_tower_are_downloaded(tmp_path, golden, monkeypatch, name):
    asked = []

    def download(hub_id, allow_patterns, **options):
        asked.append(allow_patterns)
        for file in (golden / name).iterdir():
            if any(Path(file.name).match(pattern) for pattern in allow_patterns):
                (tmp_path / file.name).write_bytes(file.read_bytes())
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_folder("Qwen/Qwen3-VL-4B-Instruct", part=part_of) == tmp_path
    assert asked[1] == [SHARDS[1]] and not any("*" in pattern or "-of-" in pattern for pattern in asked[0])
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == [SHARDS[1]]
    model = VLM_FAMILIES[name].from_pretrained("Qwen/Qwen3-VL-4B-Instruct")
    assert model.num_layers >= 2


def test_left_tensors_are_those_of_other_parts(tmp_path):
    save_file({"visual.a": torch.ones(1), "lm_head.b": torch.ones(2)}, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path, part=Qwen3VLVisionPacking.tower_prefix)
    assert list(files.shapes()) == ["visual.a"] and files.left == {"lm_head.b": "model.safetensors"}
    files = WeightFiles(tmp_path, part="nothing")  # no such tensor: the folder of a tower alone
    assert sorted(files.shapes()) == ["lm_head.b", "visual.a"] and files.left == {}


def test_a_shard_that_lacks_what_its_index_says(golden, tmp_path):
    for file in (golden / "qwen3_vl").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = read_json(tmp_path / "model.safetensors.index.json")
    index["weight_map"]["model.visual.blocks.0.norm1.weight"] = SHARDS[0]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"norm1\.weight is in model-00001.*but it is not"):
        WeightFiles(tmp_path, part=Qwen3VLVisionPacking.tower_prefix)


@pytest.mark.newest
@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize("name", NAMES)
def test_convert_writes_the_tower_alone(tmp_path, golden, name, capsys):
    """Verified (against transformers where it has the class), and reported with what was left."""
    cls, out = VLM_FAMILIES[name], tmp_path / "tower_packing"
    assert main(["convert", str(golden / name), "--output_dir", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "not the tower's: left where it is" in printed
    converted, direct = cls.from_pretrained(out).state_dict(), cls.from_pretrained(golden / name).state_dict()
    assert all(torch.equal(converted[key], value) for key, value in direct.items())
    assert (out / "preprocessor_config.json").is_file()
    assert read_json(out / "config.json")["model_type"] == cls.config_class.model_type


@pytest.mark.newest
@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize("name", NAMES)
def test_align(golden, name, capsys):
    family = VLM_FAMILIES[name].config_class.model_type
    if family not in IN_TRANSFORMERS or not hasattr(transformers, IN_TRANSFORMERS[family].vision):
        pytest.skip(f"transformers {transformers.__version__} has no such tower")
    assert main(["align", "--ckpt", str(golden / name), "--device", "cpu", "--image_size", "16"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("ALL TESTS PASSED\n") and "mixed pack" in printed
