"""Which checkpoint a run resumes from: the last complete one. A mark, which is written last, says that it is complete.

The hosts resume from the folder ``checkpoint-N`` with the highest number, complete or not. A run that is killed while
it saves leaves an incomplete one, which the launcher renames before the host starts. Whether a complete one fits the
new run is read from its files, before anything is loaded. No torch here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..utils.files import read_json, user_path
from .data_note import changed_since, note_of

MARK = "packing_complete.json"
ORDER = "packing_order.json"
FINISHED = "packing_finished.json"
STATE = "trainer_state.json"
ASIDE = "incomplete-"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The folders ``checkpoint-N``, complete or not, by their step."""
    folder = user_path(output_dir)
    found = [f for f in folder.iterdir() if _NAME.fullmatch(f.name) and f.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda f: int(_NAME.fullmatch(f.name)[1]))


def mark_complete(checkpoint: Path) -> None:
    """Write the mark, by rename: the sizes of all files that are there. Every rank must have written its own."""
    sizes = {str(f.relative_to(checkpoint)): f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()}
    sizes = {name: size for name, size in sorted(sizes.items()) if not name.startswith(MARK)}
    _write_by_rename(checkpoint / MARK, json.dumps(sizes, indent=1))


def _write_by_rename(file: Path, text: str) -> None:
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def defect(checkpoint: Path) -> str | None:
    """Why a run cannot resume from a checkpoint; None if it can."""
    if not (checkpoint / STATE).is_file():
        return f"it has no {STATE}"
    mark = checkpoint / MARK
    if not mark.is_file():
        return "saving did not finish, or was not done by this package"
    try:
        sizes = read_json(mark)
    except ValueError:
        return f"its {MARK} is damaged"
    for name, size in sizes.items():
        if type(size) is not int or Path(name).is_absolute() or ".." in Path(name).parts:
            return f"its {MARK} is damaged: {name!r:.80} has {size!r:.40} bytes"
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def last_complete(output_dir: str | os.PathLike) -> Path | None:
    return next((c for c in reversed(checkpoints(output_dir)) if defect(c) is None), None)


def set_aside(output_dir: str | os.PathLike) -> list[str]:
    """Rename each checkpoint that is not complete, so that the host does not see it; nothing is deleted.

    Returns a line for each. Several machines may do it at once in a folder that they share.
    """
    lines = []
    for checkpoint in checkpoints(output_dir):
        reason = defect(checkpoint)
        if reason is None:
            continue
        target, number = checkpoint.with_name(ASIDE + checkpoint.name), 2
        while target.exists():
            target, number = checkpoint.with_name(f"{ASIDE}{checkpoint.name}.{number}"), number + 1
        try:
            checkpoint.rename(target)
        except FileNotFoundError:  # another machine was quicker
            continue
        lines.append(
            f"{checkpoint.name} is not complete ({reason}): now {target.name}. To use it nevertheless, rename it back "
            f"and put a file {MARK} with {{}} into it"
        )
    return lines


# ---------------------------------------------------------------- does it fit this run?

STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
SHUFFLED = {
    **{"seed": 42, "data_seed": None, "dataloader_drop_last": False, "train_sampling_strategy": "random"},
    **dict.fromkeys(("group_by_length", "group_by_varlen"), False),
    **dict.fromkeys(("group_by_modality_length", "group_by_modality_length_auto"), False),
}
"""The keys, with transformers' and LLaVA's defaults, that the samples of an optimizer step and their order hang on."""


def note_order(checkpoint: Path, args: object, samples: int, data: Sequence[Sequence[str]] | None = None) -> None:
    """Write, by rename, what the position in the data hangs on: training arguments, the number of samples, and
    the files with their hashes (``note_of``; None where they are not known)."""
    given = vars(args)  # the fields alone: a compat patch gives the trainer old names for new ones
    content = {name: given.get(name, default) for name, default in {**STEP, **SHUFFLED}.items()}
    content |= {"samples": samples, "data": data}
    _write_by_rename(checkpoint / ORDER, json.dumps(content, indent=1))


def _noted(checkpoint: Path) -> dict[str, object]:
    """What :func:`note_order` wrote; nothing in a checkpoint of an older version."""
    return read_json(checkpoint / ORDER) if (checkpoint / ORDER).is_file() else {}


def other_order(checkpoint: Path, values: Mapping[str, object]) -> str | None:
    """Why a run with these arguments would not go on where the one of a checkpoint was in its data; None if it would.

    Raises ``ValueError`` for a damaged note.
    """
    saved = _noted(checkpoint)
    for name, default in STEP.items():
        now = values.get(name, default)
        if (was := saved.get(name, now)) != now:
            return (
                f"it was saved with {name} {was}, but this run has {now}: its schedule and its position in the data "
                f"count steps of that many samples. Keep it (mm_packing_batch_tokens lowers the memory of a step), or "
                f"use another output_dir to start again"
            )
    for name, default in {} if values.get("ignore_data_skip") else SHUFFLED.items():
        now = values.get(name, default)
        if (was := saved.get(name, now)) != now:
            return _shuffled(f"{name} {was}", f"{now}")
    return None


def check_count(checkpoint: Path, samples: int) -> None:
    """Raises ``ValueError`` for a dataset of another number of samples than a checkpoint was saved with."""
    saved = _noted(checkpoint)
    if (count := saved.get("samples", samples)) != samples:
        raise ValueError(f"{checkpoint}: {_shuffled(f'{count} samples', f'{samples}')}")


def other_data(checkpoint: Path, values: Mapping[str, object]) -> str | None:
    """A warning where the data are no longer what they were when the run of a checkpoint began; None if they are.

    Raises ``ValueError`` for a damaged note.
    """
    was = _noted(checkpoint).get("data")
    if was is None or values.get("ignore_data_skip"):
        return None
    if not isinstance(was, list) or not all(isinstance(f, list) and [*map(type, f)] == [str, str] for f in was):
        raise ValueError(f"{checkpoint / ORDER} is damaged: data is {was!r:.80}")
    change = changed_since(was, note_of(str(values["data_path"])))
    return change and (
        f"data_path: {change} since the run began that saved {checkpoint.name}. It goes on at the same place, so some "
        f"samples of this epoch may come twice, or never; ignore_data_skip: true begins the epoch again"
    )


def other_place(step: int, epoch: float, micro_batches: int, window: int) -> str | None:
    """A note that a run goes on elsewhere in its data than it was; None where it goes on there.

    With transformers 4.40 an optimizer step may reach into the next epoch, but a resumed run is placed as if each epoch
    had whole steps. epoch: how far the checkpoint was; micro_batches: of an epoch; window: of an optimizer step.
    """
    epochs, steps = divmod(step, -(-micro_batches // window))
    if round(epoch * micro_batches) == epochs * micro_batches + steps * window:
        return None
    return (
        f"note: the {micro_batches} micro-batches of an epoch are no multiple of gradient_accumulation_steps {window}, "
        f"and this transformers does not resume at epoch {epoch:.2f} exactly: some samples of it come twice, or never"
    )


def _shuffled(was: str, now: str) -> str:
    return (
        f"it was saved with {was}, but this run has {now}: the order is another, and some samples would come twice in "
        f"the epoch, others never. Keep it, begin the epoch again with ignore_data_skip: true, or use another "
        f"output_dir to start again"
    )


@dataclass(frozen=True)
class Saved:
    """What the files of a checkpoint say of the run that wrote it.

    processes: its world size, None where no file has it; zero_stage: None without DeepSpeed, 1 stands for 1 and 2;
    optimizer and schedule: whether their states were saved.
    """

    step: int
    max_steps: int
    processes: int | None
    zero_stage: int | None
    optimizer: bool
    schedule: bool


def read_saved(checkpoint: Path) -> Saved:
    """Look at the files of a complete checkpoint. Raises ``ValueError``, naming the file, for a damaged state."""
    state = _read_state(checkpoint / STATE)
    # One file of random numbers per rank, by the trainer; a run with one process leaves the rank out.
    processes = len(list(checkpoint.glob("rng_state_*.pth"))) or (
        1 if (checkpoint / "rng_state.pth").is_file() else None
    )
    stage, optimizer = None, (checkpoint / "optimizer.pt").is_file()
    latest = checkpoint / "latest"
    if latest.is_file():
        folder = checkpoint / _text(latest)
        shards = len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))
        whole = (folder / "mp_rank_00_model_states.pt").is_file()
        stage = (1 if whole else 3) if shards else 0
        processes = shards or processes
        optimizer = bool(shards) or whole
    schedule = (checkpoint / "scheduler.pt").is_file() or stage is not None
    return Saved(state["global_step"], state["max_steps"], processes, stage, optimizer, schedule)


def _text(file: Path) -> str:
    """The name in a file of one line. Raises ``ValueError`` for anything else."""
    try:
        name = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if Path(name).name != name or not name.isprintable():
        raise ValueError(f"{file} is damaged: it should name a folder beside it, found {name!r:.80}")
    return name


def _read_state(file: Path) -> dict[str, object]:
    state = read_json(file)
    for key in ("global_step", "max_steps"):
        if type(state.get(key)) is not int:
            raise ValueError(f"{file} is damaged: it has no whole number {key}")
    return state


def misfit(checkpoint: Path, processes: int | None, zero_stage: int | None) -> str | None:
    """Why a run of this shape cannot resume from a complete checkpoint, and what can be done; None if it can.

    Args:
        checkpoint: a complete one.
        processes: world size of the run, None where only its launcher will know.
        zero_stage: None without DeepSpeed.
    """
    saved = read_saved(checkpoint)
    fresh = "use another output_dir to start again"
    if not saved.optimizer:
        return f"it has only weights (save_only_model): {fresh}, with model_name_or_path: {checkpoint}"
    if not saved.schedule:
        return f"it has no state of the learning rate schedule (scheduler.pt): {fresh}"
    if (saved.zero_stage is None) != (zero_stage is None):
        was, now = ("DeepSpeed" if stage is not None else "no DeepSpeed" for stage in (saved.zero_stage, zero_stage))
        return f"it was saved with {was}, but this run has {now}: keep `deepspeed:` as it was, or {fresh}"
    if zero_stage is not None and saved.zero_stage != (1 if zero_stage in (1, 2) else zero_stage):
        was = "ZeRO-1 or 2" if saved.zero_stage == 1 else f"ZeRO-{saved.zero_stage}"
        return (
            f"its optimizer states are those of {was}, but this run uses ZeRO-{zero_stage}: keep the stage, or {fresh}"
        )
    if processes is not None and saved.processes is not None and processes != saved.processes:
        return (
            f"it was saved by {saved.processes} processes, but this run has {processes}: the optimizer states and the "
            f"position in the data are per process. Start {saved.processes} processes, or {fresh}"
        )
    return None


# ---------------------------------------------------------------- is there anything left to do?


def mark_finished(output_dir: str | os.PathLike, step: int, max_steps: int, epochs: float) -> None:
    """Note, after the last save of a run, that it has done all its steps."""
    content = {"step": step, "max_steps": max_steps, "epochs": epochs}
    _write_by_rename(Path(output_dir) / FINISHED, json.dumps(content))


def finished(output_dir: str | os.PathLike, values: Mapping[str, object]) -> int | None:
    """The steps that a run in ``output_dir`` has done, if it did all that ``values`` ask for and saved; else None."""
    file = user_path(output_dir) / FINISHED
    if not file.is_file():
        return None
    try:
        done = read_json(file)
        step, most, epochs = int(done["step"]), int(done["max_steps"]), float(done["epochs"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    asked = int(str(values.get("max_steps") or -1))
    if asked > 0:
        return step if step >= asked else None
    return step if step >= most and epochs >= float(str(values.get("num_train_epochs") or 3)) else None
