"""Damaged and hostile files: each reader ends in the content or in one line that names the file (``tests/fuzz``)."""

import json
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import warm
from families import tiny
from fuzz_readers import READERS, Finding, check, prepare
from safetensors.torch import load_file, save_file

from llava_packing_tower import LlavaViTPackingModel
from llava_packing_tower.checkpoint.weights import WeightFiles
from llava_packing_tower.cli.main import main
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.utils.files import check_target, write_for_program, write_text

FUZZ = Path(__file__).parents[1] / "fuzz"
INPUTS = sorted(path for path in (FUZZ / "inputs").glob("*/*"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    done = {}

    def folder_of(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name) / "good"
            prepare(name, done[name])
        return done[name]

    return folder_of


@pytest.mark.parametrize("file", INPUTS, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_what_once_found_something(prepared, file):
    name = file.parent.name
    good = (prepared(name) / READERS[name].file).read_bytes()
    try:
        check(name, prepared(name), file.read_bytes())
    finally:
        (prepared(name) / READERS[name].file).write_bytes(good)


def test_the_check_finds_what_must_not_happen(tmp_path, monkeypatch):
    def read(folder):
        text = (folder / "hosts").read_text()
        if text == "nan":
            return torch.tensor([1.0, float("nan")])
        raise {"key": KeyError("x"), "nameless": ValueError("no"), "lines": ValueError("hosts:\nno")}[text]

    monkeypatch.setitem(READERS, "hostfile", READERS["hostfile"].__class__(lambda folder: None, "hosts", read))
    for text, said in (("nan", "NaN"), ("key", "KeyError"), ("nameless", "names no file"), ("lines", "several lines")):
        with pytest.raises(Finding, match=said):
            check("hostfile", tmp_path, text.encode())


def test_mutations_find_nothing(tmp_path):
    """Some of them, always the same; CI and `tests/fuzz/run.py` do more, and others each time."""
    kinds = ("source_", "timm_", "standard_", "config_")  # the good files of all of them take seconds
    readers = [name for name in READERS if not name.startswith(kinds)] + [
        "config_radio",
        "source_moonvit",
        "timm_aimv2",
    ]
    words = ["--mutations", "40", "--seed", "19", "--keep", tmp_path, "--readers", *readers]
    command = [sys.executable, FUZZ / "run.py", *words]
    run = warm.execute(command, {**os.environ, "PYTHONPATH": str(FUZZ.parents[1])})
    assert run.returncode == 0, run.stdout + run.stderr
    assert "40 mutations of " in run.stdout and ", 0 findings" in run.stdout


# ---------------------------------------------------------------- what a checkpoint may not ask for


@pytest.fixture
def folder(tmp_path):
    tiny("llava_vit").save_pretrained(tmp_path / "tower", max_shard_size="40KB")
    return tmp_path / "tower"


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/dev/zero", "", ".", "nowhere.safetensors", 7, None, ["x"]]
)
def test_names_in_an_index_stay_inside(folder, name):
    (folder.parent / "outside.safetensors").write_bytes((folder / "config.json").read_bytes())
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][min(content["weight_map"])] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"index\.json: cannot read .*, which is no file in"):
        WeightFiles(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers(tmp_path, value):
    tiny("llava_vit").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.layers.1.mlp.fc1.weight"][3, 5] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"are damaged: NaN or infinity in encoder\.layers\.1\.mlp\.fc1\.weight"):
        LlavaViTPackingModel.from_pretrained(tmp_path)


def test_a_key_given_twice(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"hidden_size": 64,', 1))
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON: hidden_size is given twice"):
        LlavaViTPackingModel.from_pretrained(folder)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 10**9), ("image_size", 10**6), ("patch_size", 4096)])
def test_sizes_beyond_reason(folder, field, value):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {field} in its config is {value}, beyond the largest"):
        LlavaViTPackingModel.from_pretrained(folder)


def test_a_saved_config_allocates_nothing_before_weights_come(tmp_path):
    """9.7 GB of weights asked for by a config of some kilobytes: a tower of that shape is made in a small process."""
    tiny("llava_vit").save_pretrained(tmp_path)
    arguments = {"mm_vision_select_layer": -1, "mm_projector_type": "linear"}
    saved = HEVCViTPackingVisionTower(str(tmp_path), types.SimpleNamespace(**arguments)).packing_config()
    saved["config"] |= {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 12}
    program = (
        "import json, resource, sys, types\n"
        "from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower as Tower\n"
        "arguments = json.loads(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "tower = Tower('packing:nowhere', types.SimpleNamespace(**arguments))\n"
        "assert sum(p.numel() * p.element_size() for p in tower.parameters()) > 9e9\n"
        "assert all(p.isnan().any() for p in list(tower.parameters())[:1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    words = [sys.executable, "-c", program, json.dumps({**arguments, "mm_packing_config": saved})]
    run = warm.execute(words, {**os.environ, "PYTHONPATH": str(FUZZ.parents[1])})
    assert run.returncode == 0 and int(run.stdout) < 300_000, run.stdout + run.stderr  # kB


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("command", ["train", "eval-report", "probe"])
def test_one_line_and_status_2(tmp_path, capsys, command):
    prepare("done", tmp_path / "results")
    (tmp_path / "results" / "smoke" / "done.json").write_text('{"task": 1, "results": "\\ud800"}')
    (tmp_path / "run.yaml").write_bytes(b"a: \xe9")
    words = {
        "train": [str(tmp_path / "run.yaml"), "--dry_run"],
        "eval-report": [str(tmp_path / "results")],
        "probe": [str(tmp_path / "nowhere"), "--data", str(tmp_path)],
    }
    assert main([command, *words[command]]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"llava-packing {command}: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "said"), [("~no-such-user/x", "does not exist|No such file"), ("a" * 300, "File name too long")]
)
def test_names_that_no_path_can_have(tmp_path, capsys, name, said):
    for words in (["show", str(tmp_path), "--tower", name], ["train", name, "--dry_run"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert re.search(said, error) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--json", "folder", "folder is a folder"),
        ("--json", "file/x.json", "file/x.json cannot be written: .*file is not a folder"),
        ("--json", "a" * 300, "cannot be written: File name too long"),
        ("--cache", "file", "file is not a folder"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path, capsys, monkeypatch, option, value, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llava_packing_tower.cli.probe.run", lambda args: pytest.fail("it has begun"))
    assert main(["probe", "tower", "--data", ".", option, value]) == 2
    assert re.fullmatch(f"llava-packing probe: {option}: .*{said}\n", capsys.readouterr().err)


def test_what_is_written_into_does_not_take_the_place_of_a_pipe_or_a_device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.json")
    with pytest.raises(OSError, match="No such device or address"):  # nobody reads it: this does not wait
        write_text(Path("pipe.json"), "abc")
    reader = os.open("pipe.json", os.O_RDONLY | os.O_NONBLOCK)
    for file in (tmp_path / "pipe.json", Path(f"/proc/self/fd/{os.open('pipe.json', os.O_WRONLY)}")):
        check_target(file, is_folder=False)
        write_for_program(file, {"a": 1})
        assert json.loads(os.read(reader, 99)) == {"a": 1}
    assert Path("pipe.json").is_fifo() and os.listdir() == ["pipe.json"]
    (tmp_path / "log").write_text("line\n")
    with open("log", "a") as log:  # as with `--json /dev/stdout > log`
        write_text(Path(f"/dev/fd/{log.fileno()}"), "abc")
    assert (tmp_path / "log").read_text() == "line\nabc"


@pytest.mark.parametrize(
    "words",
    [
        *(["bench", "--limit", value] for value in ("-1", "nan")),
        *(["bench", "--memory", value, "--training-step"] for value in ("0", "nan")),
        *(["bench", *own] for own in (["--rows", "stock"], ["--memory", "8"], ["--check"], ["--work", "uni2@0"])),
        ["bench", "--plot", "figure.docx"],
        *(["eval", "folder", "--tasks", "smoke", "--limit", value] for value in ("x", "0", "-2", "nan")),
        ["eval", "folder", "--tasks", "smoke", "--max_frames_num", "0"],
        ["probe", "folder", "--data", "folder", "--C", "nan"],
        ["run", "--", "python", "nowhere.py"],
    ],
    ids=" ".join,
)
def test_values_that_mean_nothing(tmp_path, monkeypatch, capsys, words):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"llava-packing {words[0]}: ") and error.count("\n") == 1
    assert any(word in error for word in words[1:] if word.startswith("-") or "@" in word or word.endswith(".py"))


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda", "cuda:3", ""])
def test_a_device_that_is_not_there(golden, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name == "cuda:3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (tmp_path / "photo.png").touch()
    tower = str(golden / "siglip2")
    for words in (["show", str(tmp_path / "photo.png"), "--tower", tower], ["bench"]):
        assert main([*words, "--device", name]) == 2
        assert f"--device {name}: " in (said := capsys.readouterr().err) and said.count("\n") == 1
