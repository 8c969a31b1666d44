"""Every reader of a file that a user gives: a good file, how it is read, and what may come of a damaged one.

A reader ends in the content, or in a ``ValueError`` or ``UsageError`` of one line that names the file (or, for a value
of a configuration, its key). Anything else is a finding: another exception, numbers that are none, much memory, a hang.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from clips import write_clip
from families import GOLDEN_FAMILIES, TINY, VLM_FAMILIES, tiny
from launch_files import settings
from PIL import Image

from llava_packing_tower.checkpoint.weights import WeightFiles
from llava_packing_tower.convert.sources import read_source
from llava_packing_tower.data.images import open_image
from llava_packing_tower.data.media_check import MediaCheck, check_data
from llava_packing_tower.data.placed_samples import mark_datasets
from llava_packing_tower.data.video import probe_clip, read_clip
from llava_packing_tower.eval.preflight import check_checkpoint
from llava_packing_tower.eval.results import read_run
from llava_packing_tower.integrations.llava.model_class import base_of
from llava_packing_tower.integrations.llava.native_dataset import POSITIONS, read_positions
from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.train import data_note, hostfile, resume
from llava_packing_tower.train.launcher import make_plan
from llava_packing_tower.utils.errors import UsageError
from llava_packing_tower.utils.files import read_json

SECONDS = 20
GOLDEN = Path(__file__).parents[1] / "golden"
KEY = re.compile(
    r"(?<!\w)(mm_\w+|vision_tower|model_name_or_path|data_path|image_folder|output_dir|deepspeed|learning_rate|max_steps"
    r"|version|bf16|attn_implementation|model_max_length|image_aspect_ratio|unknown key|--hostfile needs pdsh"
    r"|checkpoint folder|report_to)(?!\w)"
)
PHOTO = Image.fromarray((np.arange(40 * 28 * 3) % 251).astype(np.uint8).reshape(28, 40, 3))
SINGLE = {"mm_vision_select_layer": -1, "mm_projector_type": "linear"}
NATIVE = {"image_aspect_ratio": "native", "mm_packing_min_patches": 4, "mm_packing_max_patches": 64}
NATIVE |= {"mm_packing_video": "frames", "mm_packing_video_max_patches": None}


@dataclass(frozen=True)
class Reader:
    """make: writes good files into an empty folder. file: the one of them that is damaged. read: reads them; what it
    returns must be finite. keys: whether a message may name a key in place of the file. lines: whether it may list."""

    make: Callable[[Path], object]
    file: str
    read: Callable[[Path], object]
    keys: bool = False
    lines: bool = False


# ---------------------------------------------------------------- training


def make_run(folder: Path) -> None:
    for name in ("tower_packing", "llama", "images"):
        (folder / name).mkdir()
    tower = {"model_type": "llava_vit_packing", "num_hidden_layers": 3, "patch_size": 4, "image_size": 16}
    (folder / "tower_packing" / "config.json").write_text(json.dumps(tower))
    decoder = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128}
    (folder / "llama" / "config.json").write_text(json.dumps(decoder))
    PHOTO.save(folder / "images" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A picture."}]
    samples = [{"id": 1, "image": "a.png", "conversations": turns}, {"id": 2, "conversations": turns[1:]}]
    (folder / "data.json").write_text(json.dumps(samples))
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}}
    fp16 = {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16}
    deepspeed = {"zero_optimization": zero, "fp16": fp16, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}
    (folder / "zero.json").write_text(json.dumps(deepspeed))
    content = {
        **settings(folder),
        "mm_projector_type": "spatial_merge",
        "image_aspect_ratio": "native",
        "mm_packing_max_patches": 64,
        "model_max_length": 128,
        "max_steps": 3,
        "version": "v1",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))


def plan_run(folder: Path) -> None:
    make_plan(folder / "run.yaml", num_processes=1)


def read_data(folder: Path) -> None:
    check_data(str(folder / "data.json"), MediaCheck({"image": str(folder / "images")}, False))


def make_marks(folder: Path) -> None:
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / resume.STATE).write_text(json.dumps({"global_step": 3, "max_steps": 8, "epoch": 1.0}))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).write_bytes(b"12")
    (folder / "data.json").write_text("[{}]")
    resume.note_order(checkpoint, SimpleNamespace(), 37, data_note.note_of(str(folder / "data.json")))
    resume.mark_complete(checkpoint)
    resume.mark_finished(folder, 3, 8, 1.0)


def read_marks(folder: Path) -> None:
    resume.finished(folder, {"max_steps": 9})
    resume.finished(folder, {})
    if (checkpoint := resume.last_complete(folder)) is not None:
        resume.misfit(checkpoint, 1, None)
        read_order(folder)


def read_order(folder: Path) -> None:
    resume.other_order(folder / "checkpoint-3", {})
    resume.other_data(folder / "checkpoint-3", {"data_path": str(folder / "data.json")})


def make_latest(folder: Path) -> None:
    make_marks(folder)
    checkpoint = folder / "checkpoint-3"
    (checkpoint / "latest").write_text("global_step3")
    (checkpoint / "global_step3").mkdir()
    resume.mark_complete(checkpoint)


def make_data_lists(folder: Path) -> None:
    make_run(folder)
    samples = json.loads((folder / "data.json").read_text())
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, samples)))
    datasets = [{"json_path": str(folder / name)} for name in ("data.json", "data.jsonl")]
    (folder / "data.yaml").write_text(yaml.safe_dump({"datasets": datasets}))


def read_data_list(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        check_data(str(folder / name), MediaCheck({"image": str(folder / "images")}, False))
        mark_datasets(str(folder / name), [{"id": 1}])

    return read


def make_positions(folder: Path) -> None:
    np.save(folder / "positions.npy", np.arange(72, dtype=np.float32).reshape(24, 3))


def positions(folder: Path) -> torch.Tensor:
    return read_positions({POSITIONS: "positions.npy"}, SimpleNamespace(image_folder=str(folder)))


# ---------------------------------------------------------------- towers


def make_tower(name: str, shard: bool = False, bin: bool = False) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        model = tiny(name)
        model.save_pretrained(folder, max_shard_size="40KB" if shard else "5GB")
        type(model).default_image_processor(model.config).save_pretrained(folder)
        if bin:
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()

    return make


def load(name: str) -> Callable[[Path], object]:
    cls = type(tiny(name))

    def read(folder: Path) -> object:
        model = cls.from_pretrained(folder)
        processor = cls.load_image_processor(folder, model.config)
        pixels = processor.preprocess([PHOTO, PHOTO.rotate(90, expand=True)], return_tensors="pt")["pixel_values"]
        return [*pixels, *model.parameters()]

    return read


def copied(name: str) -> Callable[[Path], object]:
    """A checkpoint of tests/golden: another library's own files of a family."""
    return lambda folder: shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)


def read_any(folder: Path) -> list[torch.Tensor]:
    tower = HEVCViTPackingVisionTower(str(folder), SimpleNamespace(**SINGLE))
    pixels = tower.image_processor.preprocess([PHOTO], return_tensors="pt")["pixel_values"]
    return [*pixels, *tower.vision_tower.parameters()]


def make_whole_processor(folder: Path) -> None:
    make_tower("siglip2")(folder)
    content = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": content}))


def make_training_file(folder: Path) -> None:
    from conversions import SIZES, source_state_dict

    from llava_packing_tower.models.llava_vit.config import LlavaViTConfig
    from llava_packing_tower.models.llava_vit.standard import LlavaViTModel

    state = source_state_dict(LlavaViTModel(LlavaViTConfig(**SIZES)).state_dict())
    torch.save({"state_dict": state, "epoch": 3}, folder / "backbone.pt")


def read_training_file(folder: Path) -> None:
    read_source(str(folder / "backbone.pt"), fields={"num_attention_heads": 2})


def make_saved(folder: Path) -> None:
    make_tower("llava_vit")(folder)
    tower = HEVCViTPackingVisionTower(str(folder), SimpleNamespace(**SINGLE, **NATIVE))
    content = {**SINGLE, **NATIVE, "mm_packing_exif": True, "mm_packing_config": tower.packing_config()}
    (folder / "config.json").write_text(json.dumps(content))


def read_saved(folder: Path) -> None:
    HEVCViTPackingVisionTower("packing:nowhere", SimpleNamespace(**read_json(folder / "config.json")))


def make_llava(folder: Path) -> None:
    make_saved(folder)
    content = json.loads((folder / "config.json").read_text())
    tensors = {f"model.vision_tower.{key}": value for key, value in tiny("llava_vit").state_dict().items()}
    content |= {"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "packing:nowhere"}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def make_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder), "r": 8}))


# ---------------------------------------------------------------- evaluation


def make_results(folder: Path) -> None:
    (folder / "smoke").mkdir()
    values = {"exact_match,none": 0.9, "exact_match_stderr,none": 0.01, "alias": "smoke"}
    content = {"results": {"smoke": values}, "n-samples": {"smoke": {"original": 16, "effective": 16}}}
    (folder / "smoke" / "1_results.json").write_text(json.dumps(content))
    (folder / "smoke" / "done.json").write_text(json.dumps({"key": "k", "results": "1_results.json", "task": "smoke"}))


def results(folder: Path) -> list[float]:
    return [value for result in read_run(folder).values() for value, _ in result.metrics.values()]


def picture(kind: str) -> Callable[[Path], None]:
    return lambda folder: PHOTO.save(folder / "picture", format=kind)


READERS: dict[str, Reader] = {
    "yaml": Reader(make_run, "run.yaml", plan_run, keys=True, lines=True),
    "deepspeed": Reader(make_run, "zero.json", plan_run),
    "data": Reader(make_run, "data.json", read_data, lines=True),
    "data_list": Reader(make_data_lists, "data.yaml", read_data_list("data.yaml"), lines=True),
    "data_lines": Reader(make_data_lists, "data.jsonl", read_data_list("data.jsonl"), lines=True),
    "decoder": Reader(make_run, "llama/config.json", plan_run),
    "tower_of_run": Reader(make_run, "tower_packing/config.json", plan_run),
    "hostfile": Reader(
        lambda f: (f / "hosts").write_text("# c\n\n10.0.0.3 slots=2 # x\n"),
        "hosts",
        lambda f: hostfile.check_hostfile(f / "hosts"),
        keys=True,
    ),
    "mark": Reader(make_marks, f"checkpoint-3/{resume.MARK}", read_marks),
    "state": Reader(make_marks, f"checkpoint-3/{resume.STATE}", read_marks),
    "order": Reader(make_marks, f"checkpoint-3/{resume.ORDER}", read_order),
    "latest": Reader(make_latest, "checkpoint-3/latest", lambda f: resume.misfit(f / "checkpoint-3", 2, 2)),
    "finished": Reader(make_marks, resume.FINISHED, read_marks),
    "positions": Reader(make_positions, "positions.npy", positions),
    **{f"config_{name}": Reader(make_tower(name), "config.json", load(name), lines=True) for name in
       TINY},
    "preprocessor": Reader(make_tower("dinov3"), "preprocessor_config.json", load("dinov3")),
    "preprocessor_siglip2": Reader(make_tower("siglip2"), "preprocessor_config.json", load("siglip2")),
    "processor": Reader(make_whole_processor, "processor_config.json", load("siglip2")),
    **{f"source_{name}": Reader(copied(name), "config.json", read_any, lines=True)
       for name in (*VLM_FAMILIES, *GOLDEN_FAMILIES)},
    **{f"timm_{name}": Reader(copied(f"authors/{name}_timm"), "config.json", read_any)
       for name in ("dinov3", "siglip2", "aimv2", "pe_core")},
    **{f"standard_{name}": Reader(copied(name), "config.json", lambda f: (read_source(str(f)), None)[1], lines=True)
       for name in ("llava_vit", "timm_source")},
    "index_vlm": Reader(copied("qwen3_vl"), "model.safetensors.index.json", read_any, lines=True),
    "index": Reader(
        make_tower("llava_vit", shard=True), "model.safetensors.index.json", lambda f: WeightFiles(f).shapes()
    ),
    "safetensors": Reader(make_tower("llava_vit"), "model.safetensors", load("llava_vit"), lines=True),
    "bin": Reader(make_tower("aimv2", bin=True), "pytorch_model.bin", load("aimv2"), lines=True),
    "training_file": Reader(make_training_file, "backbone.pt", read_training_file),
    "saved_tower": Reader(make_saved, "config.json", read_saved, keys=True),
    "llava": Reader(make_llava, "config.json", lambda f: check_checkpoint(f, None)),
    "adapter": Reader(make_adapter, "adapter_config.json", lambda f: base_of(f, None)),
    "results": Reader(make_results, "smoke/1_results.json", results),
    "done": Reader(make_results, "smoke/done.json", results),
    **{f"image_{kind.lower()}": Reader(picture(kind), "picture", lambda f: np.asarray(open_image(f / "picture")))
       for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")},
}  # fmt: skip


if find_spec("av"):
    READERS["video"] = Reader(
        lambda f: write_clip(f / "clip.mp4", 5, 64, 48, "mpeg4"),
        "clip.mp4",
        lambda f: (probe_clip(str(f / "clip.mp4")), read_clip(str(f / "clip.mp4")).frames)[1],
    )


# ---------------------------------------------------------------- outcomes


class Finding(Exception):
    """What must not happen; the message says what did."""


def prepare(name: str, folder: Path) -> bytes:
    """Write the good files of a reader, and read them; returns the content of the file that is to be damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reader = READERS[name]
    reader.make(folder)
    reader.read(folder)
    return (folder / reader.file).read_bytes()


def check(name: str, folder: Path, content: bytes) -> str | None:
    """Read ``content`` in place of the good file. Returns the message of the refusal, None where it was accepted.

    Raises :class:`Finding`.
    """
    reader = READERS[name]
    (folder / reader.file).write_bytes(content)
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        _check_finite(reader.read(folder))
        return None
    except (ValueError, UsageError) as error:
        message = str(error)
        if type(error) not in (ValueError, UsageError) and not type(error).__module__.startswith("llava_packing"):
            raise Finding(f"{type(error).__name__}: {message:.300}") from error
        named = Path(reader.file).name in message or f"the weights of {folder}" in message
        if not named and not (reader.keys and KEY.search(message)):
            raise Finding(f"names no file: {message:.300}") from error
        if "\n" in message.strip() and not reader.lines:
            raise Finding(f"several lines: {message:.300}") from error
        message.encode("utf-8", "backslashreplace")
        return message
    except Finding:
        raise
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error!s:.300}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _too_long(number: int, frame: object) -> None:
    raise Finding(f"not read after {SECONDS} s")


def _check_finite(value: object) -> None:
    for each in value if isinstance(value, list | tuple) else [value]:
        if (
            isinstance(each, torch.Tensor | np.ndarray | float)
            and not np.isfinite(each.detach().float().numpy() if isinstance(each, torch.Tensor) else each).all()
        ):
            raise Finding("accepted with NaN or infinity")
