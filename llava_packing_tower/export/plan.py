"""What can be exported: all that the files of a checkpoint say is checked before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..hf import MODEL_TYPE
from ..hf.projectors import unknown_projector
from ..hf.visual_settings import PROJECTOR, unsupported_reason
from ..integrations.llava.checkpoint_files import names_in_files
from ..integrations.llava.host import Host
from ..integrations.llava.model_class import base_of, check_host_has, class_name
from ..integrations.llava.registry import find_host
from ..towers.names import FUSED, PACKING, tower_kind
from ..towers.saved_tower import saved_in
from ..utils.files import CONFIG_NAME, read_json

HOSTS = ("llava_next", "llava_v1")
NOT_EXPORTED = {"mpt": "the decoder MPT, which newer versions of transformers read differently"}


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be exported: its folder, what it was trained on (for a LoRA or a projector), its
    config.json and the name of its LLaVA class."""

    folder: Path
    base: Path | None
    config: Mapping[str, object]
    class_name: str
    host: Host

    @property
    def decoder(self) -> str:
        """``model_type`` of the decoder under the LLaVA class."""
        own = decoder_of(self.class_name, self.host)
        return {"qwen2moe": "qwen2_moe"}.get(own, own)


def read_source(folder: Path, base: Path | None = None) -> Source:
    """Raises ``ValueError`` with the reason for a checkpoint that cannot be exported."""
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no {CONFIG_NAME}")
    config = read_json(folder / CONFIG_NAME)
    if not isinstance(config.get("model_type", ""), str):
        raise ValueError(f"{folder / CONFIG_NAME}: model_type must be a text, got {config['model_type']!r:.80}")
    if config.get("model_type") == MODEL_TYPE:
        raise ValueError(f"{folder} is an export already")
    found = find_host()
    if found.host.name not in HOSTS:
        raise ValueError(
            f"the LLaVA here is {found.host.title}: exports say what LLaVA-NeXT and LLaVA 1.x say, and are made with "
            f"one of these (LLAVA_NEXT_DIR)"
        )
    name = class_name(config, found.host)
    if name is None:
        raise ValueError(f"{folder} is not a LLaVA: its architectures are {config.get('architectures')}")
    check_host_has(found, name, folder)
    given = base_of(folder, None if base is None else str(base))
    if reasons := list(_reasons(config, name, found.host)):
        raise ValueError(f"{folder} cannot be exported: it has " + "; it has ".join(reasons))
    note = saved_in(folder / CONFIG_NAME, config)
    if note.get("weights") == "checkpoint" and not any("vision_tower." in n for n in names_in_files(folder, given)):
        raise ValueError(f"{folder} should contain the weights of its vision tower, but none of its files has them")
    return Source(folder, None if given is None else Path(given), config, name, found.host)


def decoder_of(name: str, host: Host) -> str:
    """What transformers calls the decoder under a LLaVA class, without separators."""
    return next(own for own, word in host.decoders if name == f"{host.class_prefix}{word}ForCausalLM")


def _reasons(config: Mapping[str, object], name: str, host: Host) -> Iterator[str]:
    tower = str(config.get("mm_vision_tower") or "")
    kind = tower_kind(tower, config.get("mm_packing_config"))
    if kind == FUSED:
        yield f"several vision towers ({tower}), and an export has one"
    elif kind != PACKING:
        yield f"no packing tower: its mm_vision_tower is {tower!r}"
    kind = str(config.get("mm_projector_type") or "linear")
    if (reason := unknown_projector(kind, config.get(PROJECTOR))) is not None:
        yield reason
    if (reason := unsupported_reason(config)) is not None:
        yield reason
    if config.get("mm_resampler_type"):
        yield f"a resampler ({config['mm_resampler_type']})"
    if config.get("add_faster_video"):
        yield "add_faster_video, whose tokens are LLaVA-NeXT's alone"
    if (decoder := decoder_of(name, host)) in NOT_EXPORTED:
        yield NOT_EXPORTED[decoder]
    if config.get("use_pos_skipping"):
        yield "use_pos_skipping"
