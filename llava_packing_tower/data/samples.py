"""Entries of a LLaVA training file: reading and checking them before training. No torch here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from ..utils.files import user_path

IMAGE_WORD = "<image>"
MEDIA = ("image", "video")
SPEAKERS = ("human", "gpt", "system", "user", "assistant")
LOOKED_FOR = 2000
"""Files that are looked for, of samples spread evenly over the dataset."""
NAMED = 5


def images_of(sample: Mapping, reads_videos: bool) -> list[str]:
    """The files of a sample's images, or of its video; null and empty ones are none."""
    given = sample.get("image") or (sample.get("video") if reads_videos else None) or []
    return given if isinstance(given, list) else [given]


def text_of(sample: Mapping) -> str:
    """The words of all turns of a sample."""
    return " ".join(turn["value"] for turn in sample["conversations"])


def drop_empty_media(samples: Sequence[dict]) -> None:
    """Remove ``image`` and ``video`` where they are null or empty: merged datasets have them in text-only rows."""
    for sample in samples:
        for key in MEDIA:
            if key in sample and not sample[key]:
                del sample[key]


def spread_indices(count: int, most: int) -> list[int]:
    """Up to ``most`` of ``count`` indices, evenly spread."""
    return list(range(count)) if count <= most else [index * count // most for index in range(most)]


def check_places(samples: Sequence[Mapping], reads_videos: bool) -> None:
    """Raises ``ValueError`` with the samples whose text has more or fewer ``<image>`` than they have images."""
    wrong = []
    for index, sample in enumerate(samples):
        count, places = len(images_of(sample, reads_videos)), text_of(sample).count(IMAGE_WORD)
        if places != count and not (count == 1 and places == 0):
            wrong.append(f"sample {sample.get('id', index)}: {count} images, {places} {IMAGE_WORD}")
    hint = "" if reads_videos else " (this LLaVA reads no videos)"
    refuse(
        f"{len(wrong)} of {len(samples)} samples have more or fewer {IMAGE_WORD} in their text than images{hint}", wrong
    )


def refuse(sentence: str, lines: Sequence[str], named: int = NAMED) -> None:
    """Raises ``ValueError`` with the sentence and the first of the lines, if there are any."""
    if lines:
        more = "" if len(lines) <= named else f"\n  and {len(lines) - named} more"
        raise ValueError(f"{sentence}:" + "".join(f"\n  {line}" for line in lines[:named]) + more)


# ---------------------------------------------------------------- before training


class DataFile(NamedTuple):
    """A file of samples, and which of them are taken: ``all``, or ``first``, ``end`` or ``random`` with how many."""

    path: Path
    strategy: str = "all"

    def taken(self, count: int) -> int:
        """How many of so many samples are taken. Raises ``ValueError`` for a strategy that LLaVA would ignore."""
        word, _, number = self.strategy.partition(":")
        if word == "all":
            return count
        given = re.fullmatch(r"(\d+)(%.*)?", number)
        if word not in ("first", "end", "random") or given is None:
            raise ValueError(
                f"sampling_strategy {self.strategy!r:.80} is not all, or first, end or random with :N or :N%"
            )
        most = math.ceil(int(given[1]) * count / 100) if given[2] else int(given[1])
        return min(most, count)


def data_files(data_path: str) -> list[DataFile]:
    """The files that ``data_path`` names: one, ``{a,b}.json``, or the ``json_path`` of a YAML of datasets.

    Raises ``ValueError`` for a YAML without them.
    """
    if found := re.match(r"^(.*)\{(.*)\}\.json$", data_path):
        return [DataFile(user_path(f"{found[1]}{name}.json")) for name in found[2].split(",")]
    path = user_path(data_path)
    if path.suffix not in (".yaml", ".yml"):
        return [DataFile(path)]
    text = _text(path)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    datasets = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(datasets, list) or not datasets:
        raise ValueError(f"{path} has no list `datasets:`")
    for number, dataset in enumerate(datasets, 1):
        if not isinstance(dataset, dict) or not isinstance(dataset.get("json_path"), str):
            raise ValueError(f"{path}: dataset {number} has no json_path")
        if dataset["json_path"].startswith("~"):
            raise ValueError(f"{path}: dataset {number}: json_path begins with ~, which LLaVA does not replace")
    return [DataFile(Path(d["json_path"]), str(d.get("sampling_strategy", "all"))) for d in datasets]


def _text(file: Path) -> str:
    try:
        if not file.is_file():
            raise ValueError(f"{file} {'is not a regular file' if file.exists() else 'does not exist'}")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{str(file)[:200]} cannot be read: {reason}") from error


def load_samples(file: Path) -> list[dict]:
    """The entries of a JSON or JSON-lines file. Raises ``ValueError`` that names the file, and the line or entry."""
    text = _text(file)
    try:
        if file.suffix == ".jsonl":
            samples = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            samples = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"{file} must hold a list of samples, found {type(samples).__name__ if samples else 'none'}")
    for index, sample in enumerate(samples):
        if not isinstance(sample, dict):
            raise ValueError(f"{file}: entry {index} is not a sample, found {type(sample).__name__}")
    return samples


def check_pairs(samples: Sequence[Mapping]) -> None:
    """Raises ``ValueError`` with the samples that are no pair of answers: ``prompt``, ``chosen`` and ``rejected``, and
    one image or video (LLaVA-NeXT puts one ``<image>`` in front of the prompt)."""
    wrong = []
    for index, sample in enumerate(samples):
        name = f"sample {sample.get('id', index)}"
        lacking = [key for key in ("prompt", "chosen", "rejected") if not isinstance(sample.get(key), str)]
        if lacking:
            wrong.append(f"{name}: no text under {', '.join(lacking)}")
        elif (count := len(images_of(sample, reads_videos=True))) != 1:
            wrong.append(f"{name}: {count} images, and one <image> in front of its prompt")
    refuse(f"{len(wrong)} of {len(samples)} samples are no pairs of answers", wrong)


def check_turns(samples: Sequence[Mapping]) -> None:
    """Raises ``ValueError`` with the samples whose conversation is missing, empty, or not of ``{"from", "value"}``."""
    wrong = []
    for index, sample in enumerate(samples):
        turns = sample.get("conversations")
        name = f"sample {sample.get('id', index)}"
        if not isinstance(turns, list) or not turns:
            wrong.append(f"{name}: no conversations")
            continue
        for turn in turns:
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in SPEAKERS:
                said = f"from {turn.get('from')!r}" if isinstance(turn, dict) else f"{turn!r:.40}"
                wrong.append(f"{name}: a turn must have a value and be from {', '.join(SPEAKERS)}, got {said}")
                break
    refuse(f"{len(wrong)} of {len(samples)} samples have a damaged conversation", wrong)
