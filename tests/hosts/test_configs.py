"""Every YAML in configs/ against the hosts' real arguments, and every script in train_scripts/ down to the plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from launch_files import need_a_host

from llava_packing_tower.integrations.llava.registry import find_host
from llava_packing_tower.train import launcher
from llava_packing_tower.utils.errors import UsageError

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
SCRIPTS = sorted(s for s in (REPOSITORY / "train_scripts").glob("*.sh") if s.name != "eval_lmms.sh")
FAMILIES = {
    "": "checkpoints/llava_vit_large_packing",
    "_siglip2": "packing:google/siglip2-so400m-patch16-naflex",
    "_aimv2": "packing:apple/aimv2-large-patch14-native",
    "_dinov3": "packing:facebook/dinov3-vitl16-pretrain-lvd1689m",
    "_qwen3_vl": "packing:Qwen/Qwen3-VL-4B-Instruct",
    "_qwen2_5_vl": "packing:Qwen/Qwen2.5-VL-7B-Instruct",
    "_radio": "packing:nvidia/C-RADIOv4-H",
    "_moonvit": "packing:moonshotai/Kimi-VL-A3B-Instruct",
    "_onevision2": "packing:lmms-lab/LLaVA-OneVision-2-8B-Instruct",
    "_perception_encoder": "packing:timm/vit_pe_lang_large_patch14_448.fb",
}
NEXT = os.environ.get("LLAVA_NEXT_DIR")
NEXT_ONLY = ("llava_next_finetune",)  # anyres with a range of grids

# The host's own parser on the command lines that the launcher makes, all in one process.
PARSE = """
import json, sys
import builder_patch
import llava.train.train as train
from transformers import HfArgumentParser
from llava_packing_tower.train import launcher
from llava_packing_tower.integrations.llava.registry import find_host
found, parsed = find_host(), {}
for name in sys.argv[1:]:
    values = launcher.resolve(launcher.read_yaml(name), launcher.known_arguments(found), found)
    # The path of the ZeRO configuration is the launcher's; tf32 is refused without a GPU.
    for key in ("deepspeed", "tf32"):
        values.pop(key, None)
    groups = HfArgumentParser(
        (train.ModelArguments, train.DataArguments, train.TrainingArguments)
    ).parse_args_into_dataclasses(launcher.to_argv(values))
    together = {}
    for group in groups:
        together.update({k: v for k, v in vars(group).items() if k in values})
    parsed[name] = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in together.items()}
    missing = values.keys() - together.keys()
    assert not missing, (name, missing)
print(json.dumps(parsed))
"""


def fits(config: Path) -> bool:
    """Whether the host at hand has every argument of a configuration."""
    return bool(NEXT) or config.stem not in NEXT_ONLY


def test_each_family_has_both_stages():
    for ending, tower in FAMILIES.items():
        for stage in ("pretrain", "finetune"):
            values = launcher.read_yaml(REPOSITORY / "configs" / f"llava_next_{stage}{ending}.yaml")
            assert values["mm_vision_tower"] == tower
            trained = values["mm_tunable_parts"].split(",")
            assert ("mm_vision_tower" in trained) == (stage == "finetune")
        # Stage 2 starts from the projector of stage 1.
        first = launcher.read_yaml(REPOSITORY / "configs" / f"llava_next_pretrain{ending}.yaml")
        assert values["pretrain_mm_mlp_adapter"] == f"{first['output_dir']}/mm_projector.bin"
        assert values["mm_projector_type"] == first["mm_projector_type"]
        assert values["mm_vision_select_layer"] == first["mm_vision_select_layer"]


def test_the_hosts_own_parser_takes_every_configuration():
    need_a_host()
    files = [str(config) for config in CONFIGS if fits(config)]
    assert len(files) >= 9
    result = warm.execute([sys.executable, "-c", PARSE, *files], {**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert result.returncode == 0, result.stderr
    parsed = json.loads(result.stdout.splitlines()[-1])
    for file in files:
        for key, value in launcher.read_yaml(file).items():
            name = launcher.ALIASES.get(key, key)
            if name in parsed[file] and isinstance(value, bool | int | float):
                assert parsed[file][name] == value, (file, name)
    tower = parsed[str(REPOSITORY / "configs" / "llava_lora.yaml")]
    assert (tower["lora_enable"], tower["lora_r"], tower["lora_alpha"]) == (True, 128, 256)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_the_launchers_checks(config):
    found = find_host()
    values = launcher.read_yaml(config)
    if not fits(config):
        with pytest.raises(UsageError, match="LLaVA-NeXT has it"):
            launcher.resolve(values, launcher.known_arguments(found), found)
        return
    resolved = launcher.resolve(values, launcher.known_arguments(found), found)
    assert "packing" in resolved["vision_tower"] and "llava" in resolved["output_dir"]
    if "lora" in config.stem:
        assert "lora" in resolved["output_dir"]
    # Beside the YAML, so that it does not matter where the command is started.
    assert (config.parent / resolved["deepspeed"]).is_file()


# ---------------------------------------------------------------- the scripts


@pytest.fixture
def shell(tmp_path):
    """Run a script with a `llava-packing` that is this checkout's, or one that prints its words; files to train on."""
    (tmp_path / "bin").mkdir()
    for name in ("peft", "flash_attn"):  # enough to be found
        (tmp_path / "fake" / name).mkdir(parents=True)
        (tmp_path / "fake" / name / "__init__.py").write_text("")
    (tmp_path / "images").mkdir()
    (tmp_path / "data.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}] * 64)
    )
    (tmp_path / "tower_packing").mkdir()
    (tmp_path / "tower_packing" / "config.json").write_text('{"model_type": "llava_vit_packing"}')

    def run(script: str, *words: str, real: bool = False, **more: str) -> subprocess.CompletedProcess:
        command = tmp_path / "bin" / "llava-packing"
        real_command = f'exec {sys.executable} -m llava_packing_tower "$@"'
        command.write_text("#!/usr/bin/env bash\n" + (real_command if real else 'printf "%s|" "$@"; exit 3') + "\n")
        command.chmod(0o755)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "NNODES", "NODE_", "MASTER_"))}
        path = os.pathsep.join([str(REPOSITORY), str(tmp_path / "fake")])
        environment = {**clean, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": path, **more}
        script = str(REPOSITORY / "train_scripts" / script)
        return subprocess.run([script, *words], capture_output=True, text=True, env=environment, cwd=tmp_path)

    run.files = ["--data_path", str(tmp_path / "data.json"), "--image_folder", str(tmp_path / "images")]
    run.files += ["--vision_tower", str(tmp_path / "tower_packing"), "--output_dir", str(tmp_path / "llava")]
    return run


NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
SCRIPT_ENVIRONMENT = {"finetune_multinode.sh": NODES}


def test_every_script_is_here():
    names = ["finetune.sh", "finetune_lora.sh", "finetune_multinode.sh", "pretrain_projector.sh"]
    assert [script.name for script in SCRIPTS] == names


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS])
def test_words_are_passed_on_and_the_exit_status_comes_back(shell, script):
    more = SCRIPT_ENVIRONMENT.get(script, {})
    nodes = "--nnodes|2|--node_rank|1|--master_addr|127.0.0.1|--master_port|29500|" if more else ""
    result = shell(script, "a b.yaml", "--key", "v w", **more)
    assert (result.stdout, result.returncode) == (f"train|a b.yaml|{nodes}--key|v w|", 3)
    words = shell(script, "--key", "v", **more).stdout.split("|")
    assert Path(words[1]).resolve() in CONFIGS and words[-3:] == ["--key", "v", ""]
    assert launcher.read_yaml(words[1])["mm_tunable_parts"] == {
        "pretrain_projector.sh": "mm_mlp_adapter",
        "finetune_lora.sh": "mm_mlp_adapter,mm_language_model",
    }.get(script, "mm_vision_tower,mm_mlp_adapter,mm_language_model")


def test_multinode_takes_a_hostfile_or_slurm_and_says_what_is_missing(shell):
    script = "finetune_multinode.sh"
    assert "--hostfile|hosts.txt|" in shell(script, HOSTFILE="hosts.txt").stdout
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": "3", "MASTER_ADDR": "m", "MASTER_PORT": "1"}
    assert "--nnodes|4|--node_rank|3|--master_addr|m|--master_port|1|" in shell(script, **slurm).stdout
    for missing in NODES:
        result = shell(script, **{k: v for k, v in NODES.items() if k != missing})
        assert result.returncode != 0 and f"set {missing}" in result.stderr and not result.stdout


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS])
def test_dry_run(shell, script):
    config = "llava_next_finetune_siglip2.yaml" if script.startswith("finetune") and "lora" not in script else None
    words = [str(REPOSITORY / "configs" / config)] if config else []
    words += [*shell.files, "--dry_run", "--num_processes", "2"]
    # What this machine, and the LLaVA that is here, do not have.
    words += ["--tf32", "null", "--pretrain_mm_mlp_adapter", "null", "--version", "v1"]
    more = SCRIPT_ENVIRONMENT.get(script, {})
    result = shell(script, *words, real=True, **more)
    assert result.returncode == 0, result.stderr
    assert "DeepSpeed ZeRO-3" in result.stdout and "--mm_tunable_parts" in result.stdout
    assert ("--node_rank 1" in result.stdout) == bool(more)
