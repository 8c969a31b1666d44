"""The demo from start to end: data, models, answers before, training, answers after, verdict."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from ...data.images import open_image
from ...data.sample_photos import PHOTOS, Photo
from ...integrations.llava import install, registry
from ...integrations.llava.host import FoundHost
from ...integrations.llava.inference import build_prompt
from ...train.arguments import ALIASES, known_arguments, resolve
from ...train.config import read_overrides, read_yaml
from ...train.deepspeed_config import check_deepspeed
from ...train.history import TOWER_RECORD
from ...utils.console import plain_console
from ...utils.errors import UsageError
from ...utils.run_lock import LOCK, RunLock
from ...utils.supervise import child
from . import OUTPUT, report
from .dataset import QUESTION, write_dataset
from .scoring import score
from .tiny_models import make_decoder, make_tokenizer, make_tower
from .train_process import Engine, TrainingFailed, launch

MARK = ".llava_packing_demo"
UNTRAINED = "llava_llama_packing_untrained"
PATHS = ("vision_tower", "model_name_or_path", "data_path", "image_folder", "output_dir")
PROCESSES = 2


class DemoFailed(Exception):
    """The demo failed; the message is for the user."""


@dataclass(frozen=True)
class Plan:
    """What one run of the demo does: the config, all its values after overrides, and where things go."""

    config: Path
    values: Mapping[str, object]
    overrides: tuple[str, ...]
    output: Path
    gpus: int

    def path(self, name: str) -> Path:
        return Path(str(self.values[name]))

    @property
    def steps(self) -> int:
        return int(self.values["max_steps"])

    @property
    def seed(self) -> int:
        return int(self.values.get("seed", 42))

    @property
    def engine(self) -> Engine:
        """What the training has to run in."""
        stage = check_deepspeed(dict(self.values), self.config.resolve().parent)
        if stage is None:
            raise UsageError(f"{self.config} has no `deepspeed:`, which the demo needs")
        return Engine("DeepSpeedEngine", stage, self.processes)

    @property
    def processes(self) -> int:
        return 1 if self.gpus == 1 else PROCESSES

    def train_command(self, *more: str) -> list[str]:
        """`llava-packing train` as a user would type it; two processes, on the CPU where there is no GPU."""
        where = ["--num_gpus", str(self.processes)] if self.gpus else ["--num_processes", str(self.processes)]
        # A single GPU takes the batch of both processes in two halves.
        alone = ["--gradient_accumulation_steps", str(PROCESSES)] if self.gpus == 1 else []
        command = [sys.executable, "-m", "llava_packing_tower", "train", str(self.config)]
        return [*command, *where, *alone, *self.overrides, *more]


def make_plan(config: Path, output: Path, words: Sequence[str]) -> Plan:
    """Read the config, apply the overrides, move its `demo_output/...` paths to `output`.

    Raises :class:`UsageError` for a path elsewhere: the demo writes its data, models and checkpoints there.
    """
    values = {ALIASES.get(key, key): value for key, value in read_yaml(config).items()}
    given = {ALIASES.get(key, key): value for key, value in read_overrides(words).items()}
    values.update(given)
    overrides = list(words)
    for name in PATHS:
        path = Path(str(values.get(name)))
        if name not in given and path.is_relative_to(OUTPUT) and output != Path(OUTPUT):
            path = output / path.relative_to(OUTPUT)
            values[name] = str(path)
            overrides += [f"--{name}", str(path)]
        if not path.is_relative_to(output):
            raise UsageError(f"{name}: {path} must be inside {output}")
    return Plan(config, values, tuple(overrides), output, torch.cuda.device_count())


def clear(output: Path) -> None:
    """An empty output folder. Raises :class:`UsageError` for one with files that no demo made."""
    found = [path for path in output.iterdir() if path.name != LOCK] if output.exists() else []
    if found and not (output / MARK).is_file():
        raise UsageError(f"{output} exists and was not made by this demo: give another folder with --output")
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()


def run_demo(config: Path, output: Path, words: Sequence[str]) -> int:
    """Run everything; returns the exit status (1 when a check failed). Raises ``DemoFailed`` or
    :class:`UsageError`."""
    console = plain_console(100, markup=True)
    plan = make_plan(config, output, words)
    try:
        host = registry.find_host()
    except ValueError as error:
        raise UsageError(str(error)) from error
    resolve(plan.values, known_arguments(host), host)
    with RunLock(output, argument="--output"):
        return _run(plan, host, console)


def _run(plan: Plan, host: FoundHost, console: Console) -> int:
    output, started = plan.output, time.monotonic()
    seconds: dict[str, float] = {}

    def stage(number: int, text: str) -> None:
        console.print(f"[bold]\\[{number}/6][/] {escape(text)}", soft_wrap=True)

    clear(output)
    install.apply()

    stage(1, f"{len(PHOTOS)} photographs to {plan.path('image_folder')}")
    photos = write_dataset(plan.path("data_path"), plan.path("image_folder"))

    stage(2, f"a tower and a decoder with random weights to {plan.path('vision_tower').parent}")
    make_models(plan)
    engine = plan.engine

    stage(3, "the untrained model: saved by LLaVA after 0 steps, loaded in a new process, asked")
    mark = time.monotonic()
    untrained = output / UNTRAINED
    zero_steps = ("--max_steps", "-1", "--num_train_epochs", "0", "--output_dir", str(untrained))
    try:
        launch(plan.train_command(*zero_steps), 0, output / "logs" / "untrained.log", console)
        before = ask(plan, untrained, "before")
        seconds["before"] = time.monotonic() - mark

        stage(4, f"fine-tuning with {host.host.title} {host.version}: {plan.steps} steps, {engine}")
        mark = time.monotonic()
        trained = launch(plan.train_command(), plan.steps, output / "logs" / "training.log", console)
        seconds["training"] = time.monotonic() - mark
    except TrainingFailed as failure:
        raise DemoFailed(str(failure)) from failure

    stage(5, f"the checkpoint {plan.path('output_dir')}: loaded in a new process, asked")
    mark = time.monotonic()
    after = ask(plan, plan.path("output_dir"), "after")
    seconds["after"] = time.monotonic() - mark

    in_memory = json.loads((plan.path("output_dir") / TOWER_RECORD).read_text(encoding="utf-8"))["tensors"]
    rows = make_rows(photos, before, after)
    checks = [
        report.check_answers(rows),
        report.check_reload(in_memory, after["tower"]),
        report.check_trained(before["tower"], in_memory),
        report.check_engine(trained.engine, engine),
    ]
    stage(6, "the task `smoke` of lmms-eval, by its own command line")
    if scored := score(plan.path("output_dir"), output / "evaluation", str(plan.values["version"]), console):
        checks.append(scored)
    draw(plan, photos, after["patch_size"], trained.history)
    seconds["total"] = time.monotonic() - started
    facts = {
        "host": f"{host.host.title} {host.version}",
        "config": str(plan.config),
        "steps": plan.steps,
        "seed": plan.seed,
        "loss": f"{trained.history[0][1]:.3f} at the first step, {trained.history[-1][1]:.3f} at the last",
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    report.write_tables(output, rows, checks, facts)

    console.print(report.rich_table(rows))
    for check in checks:
        state = "[green]ok    [/]" if check.passed else "[bold red]FAILED[/]"
        console.print(f"{state} {check.name}: {escape(check.detail)}")
    console.print(f"{seconds['total']:.0f} s. Table, loss curve and patch grids: {output}/", markup=False)
    return 0 if all(check.passed for check in checks) else 1


def make_models(plan: Plan) -> None:
    """Tokenizer, decoder and tower, from the config's seed."""
    version = str(plan.values["version"])
    answers = [photo.answer for photo in PHOTOS]
    prompts = [build_prompt(version, f"\n{QUESTION}", answer) for answer in answers]
    tokenizer = make_tokenizer(plan.path("model_name_or_path"), prompts, answers)
    make_decoder(plan.path("model_name_or_path"), len(tokenizer), plan.seed)
    make_tower(plan.path("vision_tower"), plan.seed)


def ask(plan: Plan, checkpoint: Path, name: str) -> dict:
    """What `demo.ask` finds out in a process of its own. Raises ``DemoFailed`` with the end of its log."""
    result, log = plan.output / f"answers_{name}", plan.output / "logs" / f"ask_{name}.log"
    command = [sys.executable, "-m", "llava_packing_tower.tools.demo.ask", str(checkpoint), "--output", str(result)]
    command += ["--data", str(plan.path("data_path")), "--images", str(plan.path("image_folder"))]
    command += ["--version", str(plan.values["version"])]
    with (
        log.open("w", encoding="utf-8") as file,
        child(command, os.environ, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        status = process.wait()
    if status:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        raise DemoFailed("\n".join([f"asking {checkpoint} failed with exit status {status}; log: {log}", *tail]))
    return json.loads(result.with_suffix(".json").read_text(encoding="utf-8"))


def make_rows(photos: Sequence[tuple[Photo, tuple[int, int]]], before: Mapping, after: Mapping) -> list[report.Row]:
    return [
        report.Row(
            photo=photo.name,
            width=width,
            height=height,
            grid=tuple(after["grids"][photo.name]),
            tokens=after["tokens"][photo.name],
            expected=photo.answer,
            before=before["answers"][photo.name],
            after=after["answers"][photo.name],
        )
        for photo, (width, height) in photos
    ]


def draw(
    plan: Plan,
    photos: Sequence[tuple[Photo, tuple[int, int]]],
    patch: int,
    history: Sequence[tuple[int, float]],
) -> None:
    """`loss.png`, and in `patches/` one PNG per photo."""
    report.draw_loss(plan.output / "loss.png", history)
    with np.load(plan.output / "answers_after.npz") as inputs:
        for photo, _ in photos:
            image = open_image(plan.path("image_folder") / photo.name)
            target = plan.output / "patches" / f"{Path(photo.name).stem}.png"
            report.draw_grid(target, image, inputs[photo.name], patch, photo.name)
