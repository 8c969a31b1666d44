"""What `llava-packing train` refuses before anything is loaded, in one message that names key, file and sample."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch_files import need_a_host
from PIL import Image

from llava_packing_tower.cli.main import main
from llava_packing_tower.data import samples
from llava_packing_tower.integrations.llava.registry import find_host
from llava_packing_tower.train import launcher, preflight
from llava_packing_tower.train.deepspeed_config import check_zero_keys
from llava_packing_tower.utils.errors import UsageError


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mm_tunable_parts", "mm_vision_tower,mm_projector", "mm_tunable_parts names 'mm_projector'"),
        ("mm_vision_select_feature", "ptach", "mm_vision_select_feature: 'ptach' is not known; the nearest is 'patch'"),
        ("mm_vision_select_layer", "-99", "selects hidden state -99, but a tower of"),
        ("mm_packing_attention", "sdpaa", "mm_packing_attention: 'sdpaa' is not known; the nearest is 'sdpa'"),
        ("attn_implementation", "flash", "attn_implementation: 'flash' is not known"),
        ("image_aspect_ratio", "anyrez", "image_aspect_ratio: 'anyrez' is not known"),
        ("image_aspect_ratio", "anyres_max", "image_aspect_ratio: 'anyres_max' is not known"),
        ("mm_projector_type", "mlp2_gelu", "mm_projector_type: 'mlp2_gelu' is not known"),
        ("mm_patch_merge_type", "spatia", "mm_patch_merge_type: 'spatia' is not known"),
        ("version", "v99", "version: 'v99' is not known"),
        ("pretrain_mm_mlp_adapter", "/no/such.bin", "pretrain_mm_mlp_adapter: /no/such.bin does not exist"),
        ("model_name_or_path", "checkpoints/of/mine", "model_name_or_path: folder checkpoints/of/mine does not exist"),
        ("tf32", "true", "tf32: needs an NVIDIA GPU of Ampere or newer, and this run is on the CPU"),
        ("data_path", "/no/data.json", "data_path: /no/data.json does not exist"),
    ],
)
def test_a_value_that_would_fail_late_or_be_ignored(files, tmp_path, key, value, said):
    tower = tmp_path / "vit_packing"
    tower.mkdir()
    (tower / "config.json").write_text('{"model_type": "llava_vit_packing", "num_hidden_layers": 4}')
    words = ["--vision_tower", str(tower), f"--{key}", value]
    with pytest.raises(UsageError) as caught:
        launcher.make_plan(files(), words, num_processes=1)
    assert said in str(caught.value)


def test_what_is_right_passes(files):
    need_a_host()
    for words in (
        ["--image_aspect_ratio", "anyres_max_9"],
        ["--mm_projector_type", "mlp2x_gelu", "--mm_patch_merge_type", "spatial_unpad"],
        ["--attn_implementation", "kernels-community/flash-attn"],
        ["--version", "plain"],
        ["--tf32", "false"],
    ):
        assert launcher.make_plan(files(), words, num_processes=1).samples >= 1
    names = preflight.conversations(find_host().root)
    assert {"v1", "plain", "llava_llama_2"} <= set(names)


def test_tf32_asks_the_gpu(monkeypatch):
    import torch

    for capability, refused in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        if refused:
            with pytest.raises(UsageError, match=r"compute capability 7\.5"):
                preflight.check_precision({"tf32": True}, "gpu")
        else:
            preflight.check_precision({"tf32": True}, "gpu")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([], "must be a mapping"),
        ({"zero_optimization": 2}, "must be a mapping"),
        ({"zero_optimization": {"stage": "2"}}, r"stage must be 0, 1, 2 or 3, got '2'"),
        ({"zero_optimization": {"stage": True}}, "stage must be 0, 1, 2 or 3, got True"),
        (
            {"zero_optimization": {"stage": 3, "overlap_com": True}},
            "overlap_com is unknown; the nearest is 'overlap_comm'",
        ),
    ],
)
def test_a_deepspeed_configuration(config, said):
    pytest.importorskip("deepspeed", reason="its source has the keys")
    with pytest.raises(UsageError, match=said):
        check_zero_keys(config, "zero.json")


def test_the_shipped_deepspeed_configurations_have_known_keys():
    from llava_packing_tower.train.deepspeed_config import CONFIGS, zero_stage

    for name, stage in (("zero2.json", 2), ("zero3.json", 3)):
        config = json.loads((CONFIGS / name).read_text())
        check_zero_keys(config, name)
        assert zero_stage(config) == stage
    check_zero_keys({"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": "auto"}}, "x")


# ---------------------------------------------------------------- readers


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: \xe9t\xe9\n", "is not UTF-8"),
        (b"{a: b}: c\n", "line 1: a key must be a word"),
        (b"? [a, b]\n: c\n", "line 1: a key must be a word"),
        (b"a: [1\n", "is not valid YAML"),
        (b"- a\n", "must hold `key: value` lines"),
        (b"", "must hold `key: value` lines"),
        (b"a: 1\na: 2\n", "a is given twice"),
    ],
)
def test_a_damaged_yaml_ends_in_one_line(tmp_path, capsys, content, said):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    assert main(["train", str(file), "--dry_run"]) == 2
    err = capsys.readouterr().err
    assert said in err and "run.yaml" in err and err.count("\n") == 1


def test_no_pipe_and_no_device_is_read(tmp_path, capsys):
    for name in ("/dev/zero", str(tmp_path)):
        assert main(["train", name, "--dry_run"]) == 2
        assert f"{name} is not a regular file" in capsys.readouterr().err


# ---------------------------------------------------------------- data


def write(tmp_path: Path, entries: object, name: str = "data.json") -> Path:
    file = tmp_path / name
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return file


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("[{", "data.json is damaged"),
        ({}, "must hold a list of samples"),
        ([], "must hold a list of samples, found none"),
        ([1], "entry 0 is no sample but int"),
        ([{"id": "x"}], "sample x: no conversations"),
        ([{"id": "x", "conversations": []}], "sample x: no conversations"),
        ([{"id": "x", "conversations": [{"from": "human"}]}], "sample x: a turn must have a value"),
        ([{"id": "x", "conversations": [{"from": "robot", "value": "a"}]}], "got from 'robot'"),
        ([{"conversations": turns("a", "b")}, {"conversations": "text"}], "sample 1: no conversations"),
        ([{"id": "x", "image": "a.png", "conversations": turns("<image> <image>", "b")}], "x: 1 images, 2 <image>"),
        ([{"id": "x", "image": ["a.png", "a.png"], "conversations": turns("<image>", "b")}], "x: 2 images, 1 <image>"),
        ([{"id": "x", "conversations": turns("<image>", "b")}], "x: 0 images, 1 <image>"),
        ([{"id": "x", "image": "gone.png", "conversations": turns("<image>", "b")}], "gone.png: No such file"),
        (
            [{"id": "x", "image": "data.json", "conversations": turns("<image>", "b")}],
            "data.json cannot be read as an image",
        ),
        ([{"id": "x", "image": 7, "conversations": turns("<image>", "b")}], "sample x: an image is named 7"),
    ],
)
def test_damaged_data_name_file_and_sample(tmp_path, entries, said):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    file = write(tmp_path, entries)
    with pytest.raises(ValueError, match=r"data\.json") as caught:
        samples.check_data(str(file), {"image": str(tmp_path)}, reads_videos=True)
    assert said in str(caught.value)


def test_rows_of_text_alone_may_have_an_empty_image(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    entries = [
        {"id": str(n), "image": value, "conversations": turns("q", "a")} for n, value in enumerate((None, "", []))
    ]
    entries.append({"id": "p", "image": "a.png", "conversations": turns("<image>q", "a")})
    file = write(tmp_path, entries)
    assert samples.check_data(str(file), {"image": str(tmp_path)}, reads_videos=False) == 4
    samples.drop_empty_media(entries)
    assert ["image" in entry for entry in entries] == [False, False, False, True]


def test_every_file_of_a_mixture_is_checked(tmp_path):
    good = [{"conversations": turns("q", "a")}] * 3
    write(tmp_path, good, "a.json")
    write(tmp_path, good[:2], "b.json")
    write(tmp_path, "\n".join(json.dumps(entry) for entry in good), "c.jsonl")
    write(tmp_path, f"datasets:\n- json_path: {tmp_path}/a.json\n- json_path: {tmp_path}/c.jsonl\n", "mix.yaml")
    assert samples.check_data(f"{tmp_path}/{{a,b}}.json", {}, False) == 5
    assert samples.check_data(f"{tmp_path}/mix.yaml", {}, False) == 6
    for content, said in (
        ("datasets: 1\n", "has no list `datasets:`"),
        ("datasets:\n- a: b\n", "dataset 1 has no json_path"),
        ("datasets: [\n", "is not valid YAML"),
        (f"datasets:\n- json_path: {tmp_path}/d.json\n", "d.json does not exist"),
    ):
        write(tmp_path, content, "mix.yaml")
        with pytest.raises(ValueError, match=said):
            samples.check_data(f"{tmp_path}/mix.yaml", {}, False)


def test_many_samples_are_checked_quickly(tmp_path):
    import time

    entries = [{"id": n, "conversations": turns("question " * 20, "answer " * 20)} for n in range(100_000)]
    entries[77_777]["conversations"] = []
    started = time.process_time()
    with pytest.raises(ValueError, match="sample 77777"):
        samples.check_turns(entries)
    samples.check_media(entries, {}, True)
    assert time.process_time() - started < 5


def test_the_checks_need_no_torch():
    modules = "llava_packing_tower.train.preflight, llava_packing_tower.data.samples"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_host_that_opens_the_data_itself_gets_no_empty_image():
    from llava_packing_tower.integrations.llava.native_dataset import _read_empty_media_as_text
    from llava_packing_tower.integrations.llava.patcher import Patches

    class Dataset:
        def __init__(self, path):
            self.list_data_dict = [{"image": None}, {"image": "a.png"}, {"video": ""}]

    patches = Patches()
    _read_empty_media_as_text(Dataset, patches)
    assert Dataset("x").list_data_dict == [{}, {"image": "a.png"}, {}]
    patches.undo()
    assert Dataset("x").list_data_dict[0] == {"image": None}
