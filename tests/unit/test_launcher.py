"""`llava-packing train`: the YAML is checked against the host's real arguments, and the right processes are started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from conftest import only_four
from host_runs import HOSTS, NEXT

from llava_packing_tower.cli.main import main
from llava_packing_tower.integrations.llava.host import Argument, FoundHost, host_arguments
from llava_packing_tower.integrations.llava.hosts.llava_next import HOST as NEXT_HOST
from llava_packing_tower.integrations.llava.hosts.llava_v1 import HOST as V1_HOST
from llava_packing_tower.integrations.llava.registry import find_host
from llava_packing_tower.train import deepspeed_config, launcher, resume
from llava_packing_tower.train.arguments import REQUIRED, resolve
from llava_packing_tower.utils.errors import UsageError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(launcher, "_gpus", lambda: 0)


def words_of(plan):
    """The host's arguments in a command, as a mapping."""
    words = plan.command[plan.command.index(launcher.ENTRY) + 1 :]
    return launcher.read_overrides(words)


# ---------------------------------------------------------------- what is read


@only_four  # with 5 the host is not imported without the hook, which adds fields of its own
def test_arguments_read_from_source_are_those_of_the_real_dataclasses():
    """Names of every field, and which class of the three it belongs to, against the imported host."""
    script = """
import dataclasses, json
import llava.train.train as train
groups = {g: [f.name for f in dataclasses.fields(getattr(train, g))]
          for g in ("ModelArguments", "DataArguments", "TrainingArguments")}
print(json.dumps(groups))
"""
    environment = {**os.environ, "PYTHONPATH": NEXT or ""}
    result = warm.execute([sys.executable, "-c", script], environment)
    assert result.returncode == 0, result.stderr
    real = json.loads(result.stdout.splitlines()[-1])
    read = host_arguments(find_host())
    for group, names in real.items():
        assert {name for name, a in read.items() if a.group == group} == set(names), group
    assert len(read) > 120 and read["mm_vision_select_layer"].annotation == "Optional[int]"


def test_yaml_key_given_twice(tmp_path):
    (tmp_path / "x.yaml").write_text("bf16: true\nfp16: false\nbf16: false\n")
    with pytest.raises(UsageError, match="line 3: bf16 is given twice"):
        launcher.read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "a: [1\n"])
def test_yaml_that_is_no_mapping(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"x\.yaml"):
        launcher.read_yaml(tmp_path / "x.yaml")


def test_overrides():
    words = [
        "--mm_vision_select_layer",
        "-2",
        "--learning_rate=1e-3",
        "--bf16",
        "--report_to",
        "a",
        "b",
        "--version",
        "plain",
    ]
    assert launcher.read_overrides(words) == {
        "mm_vision_select_layer": "-2",
        "learning_rate": "1e-3",
        "bf16": True,
        "report_to": ["a", "b"],
        "version": "plain",
    }
    with pytest.raises(UsageError, match="unexpected 'bf16'"):
        launcher.read_overrides(["bf16", "true"])


# ---------------------------------------------------------------- what is checked


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learnig_rate", "learning_rate"),
        ("mm_tunable_part", "mm_tunable_parts"),
        ("vison_tower", "vision_tower"),
        ("mm_vision_towr", "mm_vision_tower"),
        ("gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("image_foldr", "image_folder"),
    ],
)
def test_unknown_key_names_the_nearest(files, key, nearest):
    with pytest.raises(UsageError, match=f"unknown key '{key}'.*the nearest is '{nearest}'"):
        launcher.make_plan(files(**{key: 1}))
    with pytest.raises(UsageError, match=f"the nearest is '{nearest}'"):
        launcher.make_plan(files(), [f"--{key}", "1"])


def test_an_unknown_key_costs_no_import_of_torch(files):
    script = (
        "import sys\nfrom llava_packing_tower.cli.main import main\n"
        f"status = main(['train', {str(files(learnig_rate=1))!r}])\n"
        "print(status, [m for m in ('torch', 'transformers', 'llava', 'deepspeed') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "2 []", result.stdout + result.stderr
    assert "the nearest is 'learning_rate'" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_epochs": "many"}, "num_train_epochs: expected a number, got 'many'"),
        ({"mm_vision_select_layer": -1.5}, "mm_vision_select_layer: expected an integer, got -1.5"),
        ({"bf16": "maybe"}, "bf16: expected true or false, got 'maybe'"),
        ({"save_strategy": False}, "save_strategy: YAML reads yes, no"),
        ({"vision_tower": "x"}, "is given twice"),
        ({"data_path": "-"}, "data_path is missing"),
        ({"data_path": "/no/such.json"}, "data_path: /no/such.json does not exist"),
        ({"mm_vision_tower": "Packing:/no/tower"}, "vision_tower: folder /no/tower does not exist"),
        ({"model_name_or_path": "./no/decoder"}, "model_name_or_path: folder ./no/decoder does not exist"),
        ({"deepspeed": "zero9.json"}, "zero9.json is neither in the current folder nor in"),
        ({"use_cpu": True}, "use_cpu silently switches DeepSpeed off"),
        ({"fsdp": "full_shard"}, "fsdp and deepspeed exclude each other"),
        ({"fsdp": "full_shard", "deepspeed": "-", "lora_enable": True}, "shard of a LoRA"),
        ({"fsdp": "full_shard", "deepspeed": "-", "mm_tunable_parts": "mm_mlp_adapter"}, "shard of the projector"),
        ({"fsdp": "full_shard", "deepspeed": "-", "output_dir": "OUT"}, "would differ from an uninterrupted one"),
    ],
)
def test_what_is_wrong_is_said(files, changes, message, tmp_path):
    if changes.get("output_dir") == "OUT":
        (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
        (tmp_path / "out" / "checkpoint-2" / resume.STATE).write_text("{}")
        resume.mark_complete(tmp_path / "out" / "checkpoint-2")
        changes = {**changes, "output_dir": str(tmp_path / "out")}
    with pytest.raises(UsageError) as caught:
        launcher.make_plan(files(**changes))
    assert message in str(caught.value)


def test_a_word_that_transformers_takes_for_a_bool_on_a_command_line():
    """Its type allows texts, but its parser fails on them on each rank."""
    known = {"include_num_input_tokens_seen": Argument("include_num_input_tokens_seen", "args", "str | bool", "'no'")}
    needed = {name: Argument(name, "args", "str", "''") for name in REQUIRED}
    values = dict.fromkeys(REQUIRED, "a")
    for given, expected in (("no", False), (True, True), ("yes", True)):
        found = resolve({**values, "include_num_input_tokens_seen": given}, {**needed, **known}, None)
        assert found["include_num_input_tokens_seen"] is expected
    with pytest.raises(UsageError, match="expected true or false, got 'non_padding'"):
        resolve({**values, "include_num_input_tokens_seen": "non_padding"}, {**needed, **known}, None)


def test_use_cpu_is_fine_without_deepspeed(files):
    assert launcher.make_plan(files(use_cpu=True, deepspeed="-")).zero_stage is None


def test_an_argument_of_another_host_says_so(files):
    v1 = FoundHost(V1_HOST, Path("x"), "1.2.2")
    with pytest.raises(UsageError, match=r"LLaVA 1\.2\.2 has no such argument \(LLaVA-NeXT has it\)"):
        launcher.resolve({"image_grid_pinpoints": "(1x1)"}, {"bf16": None}, v1)


def test_names_that_transformers_changed(files):
    """evaluation_strategy of 4.40 is eval_strategy since 4.46: the installed one is used for either."""
    plans = [launcher.make_plan(files(**{name: "no"})) for name in ("evaluation_strategy", "eval_strategy")]
    assert words_of(plans[0]) == words_of(plans[1])
    assert sum(name in words_of(plans[0]) for name in ("evaluation_strategy", "eval_strategy")) == 1


@pytest.mark.parametrize("next_dir", HOSTS)
@pytest.mark.parametrize("name", ["demo", "llava_next_pretrain", "llava_next_finetune"])
def test_configurations_of_the_repository(name, next_dir, monkeypatch):
    monkeypatch.setenv("LLAVA_NEXT_DIR", next_dir)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not NEXT or Path(p) != Path(NEXT)])
    monkeypatch.delitem(sys.modules, "llava", raising=False)  # another test may have imported the other one
    found = find_host()
    assert found.host == (NEXT_HOST if next_dir else V1_HOST)
    file = REPOSITORY / "configs" / f"{name}.yaml"
    values = launcher.read_yaml(file)
    if name == "llava_next_finetune" and not next_dir:
        with pytest.raises(UsageError, match="LLaVA-NeXT has it"):
            launcher.resolve(values, launcher.known_arguments(found), found)
        return
    resolved = launcher.resolve(values, launcher.known_arguments(found), found)
    assert "packing" in resolved["vision_tower"] and "llava" in resolved["output_dir"]
    config = json.loads((REPOSITORY / "configs" / Path(resolved["deepspeed"]).name).read_text())
    assert deepspeed_config.zero_stage(config) == (2 if name == "demo" else 3)


# ---------------------------------------------------------------- what is started


def test_null_unsets_a_key(files):
    file = files(warmup_ratio=0.03)
    for words in (["--deepspeed", "null"], ["--deepspeed=null"]):
        plan = launcher.make_plan(file, words, num_processes=2)
        assert plan.zero_stage is None and "deepspeed" not in words_of(plan)
    with pytest.raises(UsageError, match="data_path is missing"):
        launcher.make_plan(file, ["--data_path", "null"], num_processes=2)


def test_a_home_is_replaced_as_a_shell_does(files, tmp_path, monkeypatch):
    """LLaVA opens ``~/images/a.jpg`` as it stands: every sample would be left out."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"data_path": "~/data.json", "image_folder": "~/images", "output_dir": "~/out", "deepspeed": "~/zero.json"}
    towers = {"mm_vision_tower": "packing:~/tower_packing + Packing:~/tower_packing", "model_name_or_path": "~/llama"}
    words = words_of(launcher.make_plan(files(**paths, **towers), num_processes=1))
    assert not any("~" in word for word in words.values()) and words["image_folder"] == f"{tmp_path}/images"
    assert words["vision_tower"] == f"packing:{tmp_path}/tower_packing + Packing:{tmp_path}/tower_packing"


@pytest.mark.parametrize("name", ["zero3.json", "configs/zero3.json"])
def test_the_shipped_deepspeed_files_are_found_from_anywhere(files, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = files(deepspeed=name)
    for beside in tmp_path.rglob("zero*.json"):
        beside.unlink()
    plan = launcher.make_plan(file, num_processes=2)
    assert plan.zero_stage == 3 and Path(plan.values["deepspeed"]).samefile(deepspeed_config.CONFIGS / "zero3.json")
    shipped = r"zero2\.json, zero2_nvlink\.json, zero3\.json, zero3_offload\.json"
    with pytest.raises(UsageError, match=rf"zero4\.json is neither .*; the package brings {shipped}"):
        launcher.make_plan(files(deepspeed="zero4.json"), num_processes=2)


def test_cpu_plan(files, monkeypatch):
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    plan = launcher.make_plan(
        files(), ["--learning_rate", "3e-3", "--vision_tower", "packing:org/model"], num_processes=2
    )
    assert plan.command[1:5] == ["-m", "llava_packing_tower.train.torchrun", "--nproc_per_node", "2"]
    assert "use_cpu" not in " ".join(plan.command)
    assert plan.environment["LOCAL_SIZE"] == "2" and "OMP_NUM_THREADS" not in plan.environment
    words = words_of(plan)
    assert words["vision_tower"] == "packing:org/model" and "mm_vision_tower" not in words
    assert float(words["learning_rate"]) == 3e-3 and words["mm_vision_select_layer"] == "-2"
    assert words["bf16"] == "True" and "report_to" not in words
    assert Path(words["deepspeed"]).is_absolute() and plan.zero_stage == 2
    assert "DeepSpeed ZeRO-2, 2 processes on the CPU" in plan.describe()


def test_gpu_plan(files, monkeypatch):
    monkeypatch.setattr(launcher, "_gpus", lambda: 4)
    plan = launcher.make_plan(files())
    # Not DeepSpeed's launcher, which counts GPUs from 0 whatever CUDA_VISIBLE_DEVICES says.
    assert plan.command[2:5] == [launcher.TORCHRUN, "--nproc_per_node", "4"]
    assert "LOCAL_SIZE" not in plan.environment and "CUDA_VISIBLE_DEVICES" not in plan.environment
    assert launcher.make_plan(files(), num_gpus=2).processes == 2
    assert launcher.make_plan(files(), num_processes=2).device == "cpu"
    with pytest.raises(UsageError, match="this machine has 4"):
        launcher.make_plan(files(), num_gpus=8)
    hostfile = str(files().parent / "hosts.txt")
    Path(hostfile).write_text("# one\nnode-a slots=8\n")
    plan = launcher.make_plan(files(), hostfile=hostfile, num_gpus=8)
    assert plan.command[plan.command.index("--hostfile") + 1] == hostfile
    with pytest.raises(UsageError, match="--num_processes is for runs on the CPU"):
        launcher.make_plan(files(), num_gpus=2, num_processes=2)
    assert launcher.make_plan(files(deepspeed="-")).command[2] == launcher.TORCHRUN


def test_counts_and_ports_and_files_of_the_wrong_kind(files, tmp_path):
    """Said as what they are: neither taken for nothing, nor for missing."""
    for wrong in ({"num_processes": 0}, {"num_processes": -1}, {"num_gpus": 0}):
        with pytest.raises(UsageError, match=r"--num_.* must be at least 1"):
            launcher.make_plan(files(), **wrong)
    for port in (0, -1, 65536):
        with pytest.raises(UsageError, match=f"--master_port must be 1 to 65535, got {port}"):
            launcher.make_plan(files(), num_processes=2, master_port=port)
    with pytest.raises(UsageError, match=r"deepspeed: .* is not a regular file"):
        launcher.make_plan(files(deepspeed=str(tmp_path)), num_processes=2)
    with pytest.raises(UsageError, match=r"--hostfile: .* is not a regular file"):
        launcher.make_plan(files(), hostfile=str(tmp_path))
    with pytest.raises(UsageError, match=r"model_name_or_path: .*config.yaml is not a folder"):
        launcher.make_plan(files(), ["--model_name_or_path", str(files())], num_processes=2)
    with pytest.raises(UsageError, match="lora_r must be at least 1, got 0"):
        launcher.make_plan(files(), ["--lora_enable", "true", "--lora_r", "0"], num_processes=2)
    with pytest.raises(UsageError, match="vision_tower: 'packing:' names none"):
        launcher.make_plan(files(), ["--vision_tower", "packing:"], num_processes=2)


def test_one_process_without_deepspeed_is_not_wrapped(files, monkeypatch):
    """Not in DDP (torchrun's environment), and not in DataParallel (several GPUs in sight)."""
    plan = launcher.make_plan(files(deepspeed="-"), num_processes=1)
    assert plan.command[1:3] == ["-m", launcher.ENTRY]
    assert launcher.make_plan(files(), num_processes=1).command[2] == launcher.TORCHRUN
    assert launcher.make_plan(files(deepspeed="-"), num_processes=2).command[2] == launcher.TORCHRUN
    monkeypatch.setattr(launcher, "_gpus", lambda: 4)
    plan = launcher.make_plan(files(deepspeed="-"), num_gpus=1)
    assert plan.command[1:3] == ["-m", launcher.ENTRY]
    script = "import os, sys; sys.exit(int(os.environ['CUDA_VISIBLE_DEVICES']))"
    plan.command = [sys.executable, "-c", script]
    for visible, first in (("3,1", 3), (None, 0)):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert launcher.run(plan) == first


def test_dry_run_prints_the_plan_and_starts_nothing(files, capsys, monkeypatch):
    monkeypatch.setattr(launcher, "run", lambda plan: pytest.fail("started"))
    assert main(["train", str(files()), "--dry_run", "--num_processes", "2", "--max_steps", "5"]) == 0
    shown = capsys.readouterr().out
    assert "engine: DeepSpeed ZeRO-2, 2 processes on the CPU" in shown and "--max_steps 5" in shown


def test_exit_status_of_the_processes_is_passed_on(files, monkeypatch):
    plan = launcher.make_plan(files())
    plan.command = [sys.executable, "-c", "import os, sys; sys.exit(7 if os.environ['LOCAL_SIZE'] == '1' else 0)"]
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    assert launcher.run(plan) == 7


def test_a_rank_leaves_without_taking_the_interpreter_apart(tmp_path):
    """What aborts while the interpreter ends must not turn a run that has saved everything into a failed one."""
    script = """
import atexit, os, pathlib, sys
from llava_packing_tower.train import entrypoint
class Abort:
    def __del__(self, abort=os.abort):
        abort()
module_level = Abort()
atexit.register(lambda: pathlib.Path(sys.argv[1]).write_text("done"))
print("last words", end="")
if sys.argv[2] == "leave":
    entrypoint.leave()
"""
    for how, status in (("leave", 0), ("end", -6)):
        command = [sys.executable, "-c", script, str(tmp_path / how), how]
        result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        assert result.returncode == status, result.stderr
        assert (tmp_path / how).read_text() == "done" and (result.stdout == "last words" or how == "end")


@pytest.mark.parametrize("script", [*sorted((REPOSITORY / "train_scripts").glob("*.sh")), REPOSITORY / ".ci" / "run"])
def test_shell_scripts(script):
    assert "set -euo pipefail" in script.read_text()
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).returncode == 0
