"""A sample that cannot be read is left out of its batch, or ends the run with an error that names it. It is never
replaced by another.

The dataset returns a mark in place of such a sample, the collator removes the marks and notes them in the batch, and
the training step removes the note. A batch of nothing but marks still makes its step, on a placeholder whose loss is
multiplied by zero: other ranks, and ZeRO, wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from transformers import Trainer, TrainerCallback

from ...data.images import EXHAUSTED, UnreadableImage
from ...utils.files import write_text
from .methods import Call, add_step
from .patcher import Patches
from .registry import trainer_class

logger = logging.getLogger(__name__)

NOTE = "packing_left_out"
"""Where a batch carries what was left out of it: ``samples``, and whether nothing else is in it (``empty``)."""
FILE = "left_out_samples.json"
PLACEHOLDER_TOKENS, PLACEHOLDER_SUPERVISED = 2, 1
"""Of :func:`placeholder` in its step: two words, of which the first predicts the second."""
NAMED = 20
IGNORE = -100
_RECORDS = "_llava_packing_left_out"
_reading: ContextVar[bool] = ContextVar("a sample is being read", default=False)


@dataclass(frozen=True)
class LeftOut:
    """A sample that could not be read: its id, or its number in the data; the file; what is wrong with it."""

    sample: str
    file: str | None
    reason: str

    def __str__(self) -> str:
        return f"sample {self.sample}: {self.reason}"


# ---------------------------------------------------------------- in the dataset


def leave_out(call: Call) -> Iterator[None]:
    """Give a :class:`LeftOut` for a sample that cannot be read; with ``mm_packing_strict``, raise for it.

    Raises ``UnreadableImage`` or, for whatever else goes wrong, ``ValueError``, with the sample's id.
    """
    if _reading.get() and (error := sys.exc_info()[1]) is not None:
        raise error  # LLaVA-NeXT is about to take the next sample for one whose video it cannot read
    dataset, index = call.self, call.arguments["i"]
    entry = dataset.list_data_dict[index] if isinstance(index, int) else {}
    name = str(entry.get("id", index))
    token = _reading.set(True)
    try:
        yield
    except (UnreadableImage, OSError) as error:
        if getattr(error, "errno", None) in EXHAUSTED:
            raise
        if getattr(dataset.data_args, "mm_packing_strict", False):
            raise UnreadableImage(f"sample {name}: {error}", getattr(error, "file", None)) from error
        file = getattr(error, "file", None) or getattr(error, "filename", None)
        call.result = LeftOut(name, file and str(file), str(error))
        logger.warning("left out: %s", call.result)
    except Exception as error:
        raise ValueError(f"sample {name}: {type(error).__name__}: {error}") from error
    finally:
        _reading.reset(token)


def one_sample(call: Call) -> None:
    """LLaVA-NeXT tries a sample again, and then takes the next one: here it is this sample or none."""
    call.result = call.self._get_item(call.arguments["i"])


# ---------------------------------------------------------------- in the collator


def split(instances: Sequence) -> tuple[list, list[LeftOut]]:
    """The samples that could be read, and those that could not."""
    there = [instance for instance in instances if not isinstance(instance, LeftOut)]
    return there, [instance for instance in instances if isinstance(instance, LeftOut)]


def note(left_out: Sequence[LeftOut], is_empty: bool) -> dict[str, object]:
    """What a batch says of the samples that were left out; plain types, which every loader passes on."""
    return {"samples": [[each.sample, each.file, each.reason] for each in left_out], "empty": is_empty}


def placeholder(tokenizer: object, blank: object) -> dict[str, object]:
    """A sample of two words without labels, for a batch of which nothing is left.

    blank: the host's image of a sample without one, or None.
    """
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    words = (tokenizer.eos_token_id, tokenizer.bos_token_id, 0, 1)
    ids = torch.tensor([next(word for word in words if word not in (None, pad))] * PLACEHOLDER_TOKENS)
    sample = {"id": None, "input_ids": ids, "labels": torch.full_like(ids, IGNORE)}
    return sample if blank is None else {**sample, "image": blank}


# ---------------------------------------------------------------- in the trainer


def into_trainer(module: ModuleType, patches: Patches) -> None:
    """Take the notes out of the batches, make the steps of empty ones, report at the end."""

    def read_note(call: Call) -> Iterator[None]:
        trainer, inputs = call.self, call.arguments["inputs"]
        if NOTE not in inputs:
            yield
            return
        found = inputs.pop(NOTE)
        vars(trainer).setdefault(_RECORDS, {}).update((tuple(each), None) for each in found["samples"])
        with without_loss(trainer) if found["empty"] else contextlib.nullcontext():
            yield

    def report(call: Call) -> Iterator[None]:
        yield
        call.self.add_callback(LeftOutReport(call.self))

    add_step(Trainer, "Trainer.training_step", "left_out", read_note, patches)
    add_step(trainer_class(module), "LLaVATrainer.__init__", "left_out_report", report, patches)


@contextlib.contextmanager
def without_loss(trainer: Trainer) -> Iterator[None]:
    """Within it, the trainer's loss is zero, with gradients of zero for everything that is trained.

    A mean over no label would be NaN: the placeholder's words are its labels in here, where nothing counts them.
    """
    compute, own = trainer.compute_loss, vars(trainer).get("compute_loss")

    @functools.wraps(compute)
    def zero(model: torch.nn.Module, inputs: Mapping, *args: object, **kwargs: object) -> object:
        if "num_items_in_batch" in kwargs:
            kwargs["num_items_in_batch"] = None
        ids = inputs["input_ids"]
        result = compute(model, {**inputs, "labels": ids.masked_fill(ids < 0, IGNORE)}, *args, **kwargs)
        return (result[0] * 0, *result[1:]) if isinstance(result, tuple) else result * 0

    trainer.compute_loss = zero
    try:
        yield
    finally:
        del trainer.compute_loss
        if own is not None:
            trainer.compute_loss = own


class LeftOutReport(TrainerCallback):
    """Writes the samples that were left out, of all ranks, beside the checkpoints, and prints them at the end."""

    def __init__(self, trainer: Trainer) -> None:
        self.records: dict[tuple, None] = vars(trainer).setdefault(_RECORDS, {})

    def on_train_begin(self, args, state, control, **kwargs):
        file = Path(args.output_dir) / FILE
        if not state.is_world_process_zero or not file.is_file():
            return
        if state.global_step == 0:
            file.unlink()  # of an earlier run
        else:
            content = json.loads(file.read_text(encoding="utf-8"))
            self.records.update(((e["sample"], e["file"], e["reason"]), None) for e in content)

    def on_save(self, args, state, control, **kwargs):
        self._write(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        found = self._write(args, state)
        if found and state.is_world_process_zero:
            lines = [f"left out: {len(found)} samples that cannot be read ({Path(args.output_dir) / FILE})"]
            lines += [f"  {LeftOut(*each)}" for each in found[:NAMED]]
            lines += [f"  and {len(found) - NAMED} more"] if len(found) > NAMED else []
            print("\n".join(lines), flush=True)

    def _write(self, args, state) -> list[tuple]:
        """The samples of all ranks. Collective."""
        found = sorted(gathered(self.records), key=str)
        if found and state.is_world_process_zero:
            content = [{"sample": sample, "file": file, "reason": reason} for sample, file, reason in found]
            write_text(Path(args.output_dir) / FILE, json.dumps(content, indent=1) + "\n")
        return found


def gathered(records: Mapping[tuple, None]) -> set[tuple]:
    """The keys of all ranks. Collective."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return set(records)
    every: list[list] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, list(records))
    return {key for keys in every for key in keys}
