"""Small models, data and a YAML for training a real host, and the commands that train it and load the result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import warm
import yaml
from conftest import FIVE
from PIL import Image

from llava_packing_tower.tools.demo.tiny_models import make_decoder, make_tokenizer, make_tower
from llava_packing_tower.utils.net import free_port

REPOSITORY = Path(__file__).parents[2]
NEXT = os.environ.get("LLAVA_NEXT_DIR") or ""
# The values of LLAVA_NEXT_DIR that give each real host; to parametrise a test with.
NEEDS_NEXT = [pytest.mark.next, pytest.mark.skipif(not NEXT, reason="LLAVA_NEXT_DIR is not set")]
HOSTS = [pytest.param("", id="llava_v1"), pytest.param(NEXT, id="llava_next", marks=NEEDS_NEXT)]
needs_host = pytest.mark.skipif(
    find_spec("llava") is None or find_spec("deepspeed") is None or torch.cuda.is_available(),
    reason="needs LLaVA and DeepSpeed on a machine without a GPU",
)
WORDS = ("cat", "moon", "cup")
QUESTION = "What is in the photo?"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def make_workspace(folder: Path) -> Path:
    """Tower (by its name a packing one), decoder, photos, data with a text-only sample, and ``config.yaml``."""
    prompts = [f"{SYSTEM}USER: <image>\n{QUESTION} ASSISTANT: {word}</s>" for word in WORDS]
    tokenizer = make_tokenizer(folder / "llama_tiny", prompts, WORDS)
    make_decoder(folder / "llama_tiny", len(tokenizer), seed=1)
    make_tower(folder / "vit_packing", seed=2)
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    data = []
    for number in range(7):
        name = f"{number}.png"
        pixels = noise.integers(0, 255, (60 + 9 * number, 90 - 5 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        turns = [("human", f"<image>\n{QUESTION}"), ("gpt", WORDS[number % len(WORDS)])]
        data.append({"id": name, "image": name, "conversations": [{"from": f, "value": v} for f, v in turns]})
    data.append(
        {"id": "text", "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "cup"}]}
    )
    (folder / "data.json").write_text(json.dumps(data))
    config = {
        "mm_vision_tower": str(folder / "vit_packing"),
        "mm_vision_select_layer": -1,
        "mm_projector_type": "mlp2x_gelu",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_vision_tower_lr": 5e-2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "model_name_or_path": str(folder / "llama_tiny"),
        "attn_implementation": "sdpa",
        "version": "v1",
        "model_max_length": 512,
        "data_path": str(folder / "data.json"),
        "image_folder": str(folder / "images"),
        "bf16": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "seed": 3,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": "set by each test",
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def importable(*folders: Path) -> str:
    """PYTHONPATH with these in front of what it has."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def environment(next_dir: str) -> dict[str, str]:
    return {**os.environ, "LLAVA_NEXT_DIR": next_dir, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def execute(
    command: list[str], env: dict[str, str], timeout: float = 400, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess:
    """Run a launcher in a process group of its own; past the time limit all of it is killed, and the test fails."""
    process = subprocess.Popen(
        command,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise  # Ctrl-C, or pytest's own time limit
        raise AssertionError(f"still running after {timeout} s:\n{out[-3000:]}\n{err[-5000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def train_command(config: Path, output: Path, *words: str, processes: int = 2) -> list[str]:
    command = [sys.executable, "-m", "llava_packing_tower", "train", str(config), "--num_processes", str(processes)]
    return [*command, "--output_dir", str(output), *words]


def train(config: Path, output: Path, next_dir: str, *words: str, processes: int = 2) -> str:
    """`llava-packing train` on the CPU; returns what it printed. Fails the test if it exits with an error."""
    result = execute(train_command(config, output, *words, processes=processes), environment(next_dir))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def reload(jobs: list[dict], workspace: Path, next_dir: str) -> list[dict]:
    """Load checkpoints ``{"folder", "base"}`` in a new process (host_reload.py): a report, or an error, of each."""
    prompt = f"{SYSTEM}USER: <image>\n{QUESTION} ASSISTANT:"
    script = Path(__file__).parent / "host_reload.py"
    command = [sys.executable, str(script), json.dumps(jobs, default=str), str(workspace / "images" / "3.png"), prompt]
    result = warm.execute(command, {**environment(next_dir), "PYTHONPATH": importable(REPOSITORY)})
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# ---------------------------------------------------------------- trained once, for several tests

# Two stages for LoRA, one in each of the two environments that `make test` runs.
LORA_STAGE = 2 if FIVE else 3


def words_for(kind: str, folder: Path) -> list[str]:
    words = ["--vision_tower", str(folder / "vit_packing")]
    if kind == "fsdp":
        return [*words, "--fsdp", "full_shard auto_wrap"]
    stage = {"zero2": 2, "zero3": 3, "lora": LORA_STAGE, "frozen": 2}[kind]
    words += ["--deepspeed", f"configs/zero{stage}.json"]
    if kind == "lora":
        words += ["--lora_enable", "true", "--lora_r", "4", "--lora_alpha", "8"]
    if kind == "frozen":  # in float32; the learning rate for the tower stays, although it is frozen
        words += ["--bf16", "false", "--mm_tunable_parts", "mm_mlp_adapter,mm_language_model"]
        words += ["--mm_packing_peak_tflops", "0.5", "--profile", "1"]
    return words


def output_of(folder: Path, kind: str) -> Path:
    return folder / ("llava_llama_lora_packing" if kind == "lora" else "llava_llama_packing")


def two_machines(config: Path, output: Path, words: list[str], meet: bool = False) -> str:
    """The launcher started twice, as on two machines with one process each; what they printed.

    meet: at a rendezvous, where torchrun gives out the ranks; else machine 0 is told and every one has its number.
    """
    port = str(free_port())
    shared = ["--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", port]
    if meet:
        shared = ["--nnodes", "2", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", output.parent.name]
    results: list = [None, None]

    def start(rank: int) -> None:
        number = [] if meet else ["--node_rank", str(rank)]
        command = train_command(config, output, *words, *shared, *number, processes=1)
        results[rank] = execute(command, environment(NEXT))

    threads = [threading.Thread(target=start, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert result is not None and result.returncode == 0, result and result.stdout + result.stderr
    first, second = (result.stdout for result in results)
    if "step 1/" in second and meet:  # it was given rank 0
        first, second = second, first
    assert "step 1/" in first and "step 1/" not in second, first + second
    return first


class Trainings:
    """Real trainings, each run when it is first asked for. Every one has a copy of the tower for itself."""

    def __init__(self, make_folder) -> None:
        self.make_folder = make_folder
        self.workspace = make_folder("hosts")
        self.config = make_workspace(self.workspace)
        self.kept: dict[str, tuple[Path, str]] = {}

    def run(self, kind: str) -> tuple[Path, str]:
        """The folder that holds the tower and the output (:func:`output_of`), and what was printed."""
        if kind not in self.kept:
            folder = self.make_folder(kind)
            shutil.copytree(self.workspace / "vit_packing", folder / "vit_packing")
            output, words = output_of(folder, kind), words_for(kind, folder)
            if kind in ("lora", "zero2"):
                log = two_machines(self.config, output, words, meet=kind == "zero2")
            else:
                log = train(self.config, output, NEXT, *words, processes=1 if kind == "frozen" else 2)
            self.kept[kind] = (folder, log)
        return self.kept[kind]

    __getitem__ = run


def run_checks(module: str, next_dir: str, folder: Path, timeout: float) -> dict[str, str | None]:
    """What each check of a module of this folder said in a host: None, or how it failed (see ``checks_in_host``)."""
    report = folder / "checks.xml"
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent / "checks_in_host.py"), "-q"]
    command += ["--timeout=0", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
    command += [f"--basetemp={folder / 'temp'}"]
    env = {**environment(next_dir), "PYTHONPATH": importable(REPOSITORY), "HOST_CHECKS": module}
    for name in [name for name in env if name.startswith(("PYTEST_", "COV_"))]:
        del env[name]
    result = warm.execute(command, env, timeout=timeout)
    assert report.is_file(), result.stdout + result.stderr
    said: dict[str, str | None] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"].partition("[")[2].removesuffix("]")
        failed = [child for child in case if child.tag in ("failure", "error", "skipped")]
        said[name] = "\n".join(child.text or child.tag for child in failed) or None
    return said
