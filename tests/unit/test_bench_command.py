"""`llava-packing bench` on the CPU: the original tower beside packed, and the command with all that it writes."""

import json
import sys
import types

import pytest
import torch

from llava_packing_tower.cli.main import main
from llava_packing_tower.tools.bench import original_tower
from llava_packing_tower.tools.bench.availability import Unavailable

CPU = torch.device("cpu")


# ---------------------------------------------------------------- the original tower


MODEL_FILE = """
from flash_attn import flash_attn_varlen_func
from timm.models.registry import register_model
from transformers.utils import is_flash_attn_2_available
import torch
assert is_flash_attn_2_available()
class LlavaViTPackingConfig:
    def __init__(self, **fields):
        self.__dict__.update(fields)
class LlavaViTPackingModel(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear = torch.nn.Linear(config.hidden_size, 2)
        self.register_buffer("frequencies", torch.ones(3), persistent=False)
@register_model
def preset():
    pass
"""
TOWER_FILE = """
from llava.utils import rank0_print
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel
import torch
class HEVCViTPackingVisionTower(torch.nn.Module):
    def forward(self, images):
        return images, self.select_layer
"""


@pytest.fixture
def fresh_modules(monkeypatch):
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] == original_tower.PACKAGE:
            del sys.modules[name]


@pytest.fixture
def flash_attn(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = None
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("nested", [False, True])
def test_original_from_a_folder_of_two_files(tmp_path, fresh_modules, flash_attn, nested):
    for name, text in ((original_tower.MODEL, MODEL_FILE), (original_tower.TOWER, TOWER_FILE)):
        file = tmp_path / (original_tower.SOURCES[name][1] if nested else f"{name}.py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    outside = {name: sys.modules.get(name) for name in ("timm", "timm.models", "llava", "llava.utils")}
    path = list(sys.path)
    import transformers.utils

    check = transformers.utils.is_flash_attn_2_available
    tower = original_tower.original_tower(tmp_path, {"hidden_size": 4}, -2, CPU, torch.bfloat16)
    assert tower(1) == (1, -2)
    assert tower.vision_tower.linear.weight.dtype == torch.bfloat16
    assert tower.vision_tower.frequencies.dtype == torch.float32
    assert {name: sys.modules.get(name) for name in outside} == outside and sys.path == path
    assert transformers.utils.is_flash_attn_2_available is check


def test_original_says_what_is_missing(tmp_path, fresh_modules, flash_attn, monkeypatch):
    with pytest.raises(Unavailable, match="no folder"):
        original_tower.original_tower(tmp_path / "nothing", {}, -2, CPU, torch.float32)
    with pytest.raises(Unavailable, match="28efa3a"):
        original_tower.original_tower(tmp_path, {}, -2, CPU, torch.float32)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(Unavailable, match="flash-attn"):
        original_tower.original_tower(tmp_path, {}, -2, CPU, torch.float32)


# ---------------------------------------------------------------- the command


def bench(*arguments):
    return main(["bench", "--device", "cpu", "--repeat", "2", *map(str, arguments)])


@pytest.mark.newest
def test_bench_beside_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    families = {"siglip2": "Siglip2VisionModel", "aimv2": "Aimv2VisionModel", "dinov3": "DINOv3ViTModel"}
    here = [family for family, name in families.items() if hasattr(transformers, name)]
    if not here:
        pytest.skip(f"transformers {transformers.__version__} has none of them")
    file, picture = tmp_path / "out" / "bench.json", tmp_path / "out" / "bench.png"
    code = bench(
        *("--family", ",".join(here), "--work", "ragged3,train:ragged2", "--peers", "transformers,original"),
        *("--json", file, "--plot", picture),
    )
    assert code == 0
    assert sorted(f.name for f in file.parent.iterdir()) == ["bench.json", "bench.png"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(file.read_text())
    assert content["tiny"] is True and content["versions"]["torch"] == torch.__version__ and content["date"]
    assert [(r["family"], r["work"]) for r in content["results"]] == [
        (family, work) for family in here for work in ("ragged3", "train:ragged2")
    ]
    for result in content["results"]:
        assert result["targets"] == []  # these are about the real sizes on a GPU
        systems = {s["name"]: s for s in result["systems"]}
        packed = systems["packed (auto)"]
        assert packed["packed"] and len(packed["ms_of_each_round"]) == result["rounds"] == 2 and packed["ms"] > 0
        assert packed["attention_backend"] == "sdpa"
        theirs = systems["transformers, image by image"]
        assert theirs["lowest_cosine_to_packed"] > 0.9999
        assert result["times_faster"]["packed (auto)"][theirs["name"]] == pytest.approx(theirs["ms"] / packed["ms"])
        if result["family"] == "siglip2":
            assert systems["transformers, padded + mask"]["lowest_cosine_to_packed"] > 0.9999
        assert "LlavaViT" in systems["original"]["note"]
    assert "original: not available" in capsys.readouterr().out


def test_bench_of_llava_vit_alone(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert bench("--work", "uni2,ragged3", "--backend", "sdpa,eager,flash_attention_2", "--json", file) == 0
    for result in json.loads(file.read_text())["results"]:
        systems = {s["name"]: s for s in result["systems"]}
        assert systems["packed (sdpa)"]["lowest_cosine_to_packed"] is None  # the others are compared with this one
        assert systems["packed (eager)"]["lowest_cosine_to_packed"] > 0.9999
        assert systems["packed (eager)"]["attention_backend"] == "eager"
        assert systems["packed (flash_attention_2)"]["note"].startswith("not available")
    assert "tiny models" in capsys.readouterr().out


def test_bench_stops_at_its_limit(capsys):
    assert bench("--limit", "0") == 0
    assert capsys.readouterr().out.count("time limit (--limit) was reached") == 3


def test_scaling_and_breakdown(tmp_path, capsys):
    file = tmp_path / "scaling.json"
    assert bench("--scaling", "--json", file) == 0
    series = json.loads(file.read_text())["scaling"]
    assert [line["over"] for line in series] == ["images", "tokens_per_image"]
    for line in series:
        assert all(0 < p["attention_ms"] <= p["ms"] and p["backend"] == "sdpa" for p in line["points"])
        assert all(p["images"] * p["tokens_per_image"] == p["tokens"] for p in line["points"])
    file = tmp_path / "breakdown.json"
    assert bench("--breakdown", "--work", "ragged4", "--json", file) == 0
    (part,) = json.loads(file.read_text())["breakdown"]
    assert part["layers"] == 2 and all(part["ms_by_kind"][kind] > 0 for kind in ("matmuls", "attention"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--family", "clip"], "unknown family 'clip'"),
        (["--work", "uni"], "workload 'uni'"),
        (["--peers", "vllm"], "unknown peers vllm"),
        (["--backend", "fast"], "unknown attention backend 'fast'"),
        (["--repeat", "0"], "--repeat"),
        (["--scaling", "--breakdown"], "exclude each other"),
    ],
)
def test_bench_refuses(arguments, message, capsys):
    assert main(["bench", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
