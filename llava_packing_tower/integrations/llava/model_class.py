"""The class of a LLaVA checkpoint is that of its ``architectures``, whatever its folder is called.

LLaVA itself looks for "qwen", "llama", "lora" and the like in names: a Qwen checkpoint in ``checkpoints/run1`` would
become a Llama that lacks the biases of its attention.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...utils.files import CONFIG_NAME, read_json, user_path
from .checkpoint_files import ADAPTER, PROJECTOR
from .host import FoundHost, Host
from .methods import Call, add_step
from .patcher import Patches
from .registry import host_of, loader
from .self_contained import self_contained

logger = logging.getLogger(__name__)

NOT_IMPORTED = ("LlavaQwenMoeForCausalLM", "LlavaGemmaForCausalLM")
"""Classes that LLaVA-NeXT's loader and its train.py name, but do not import."""
_dtype: ContextVar[torch.dtype | None] = ContextVar("dtype of a model that is being loaded", default=None)


# ---------------------------------------------------------------- what a config says


def class_name(config: Mapping[str, object], host: Host, plain: bool = False) -> str | None:
    """The class of a host for a checkpoint with this config.json content; None for one that is no LLaVA's.

    Where training saved a LoRA or the projector alone, ``architectures`` are those of the plain decoder under it.

    plain: take a plain decoder, too, for what LLaVA makes of it.
    """
    architectures = config.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if own := [name for name in names if host.model_class(name)]:
        return own[0]
    model_type, family = str(config.get("model_type") or ""), host.class_prefix.lower()
    if not plain and host.tower_settings[0] not in config and not model_type.startswith(f"{family}_"):
        return None
    model_type = "llama" if model_type == family else model_type.removeprefix(f"{family}_")
    decoders = [name.removesuffix("ForCausalLM") for name in names] + [model_type]
    return next(filter(None, map(host.class_for, decoders)), None)


def module_of(folder: Path, name: str) -> str | None:
    """The module in a host's folder of language models that defines a class of this name; imports nothing."""
    for file in sorted(folder.glob("*.py")):
        if re.search(rf"^class {name}\b", file.read_text(encoding="utf-8"), re.MULTILINE):
            return file.stem
    return None


def read_config(name_or_path: str) -> dict | None:
    """The config.json of a folder or hub id; None where there is none (an adapter of a language model, for example)."""
    folder = user_path(name_or_path)
    if folder.is_dir():
        return read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else None
    try:
        return PretrainedConfig.get_config_dict(name_or_path)[0]
    except OSError:  # the host reads it next, and says what is wrong
        return None


def find_class(host: Host, name: str) -> type[PreTrainedModel]:
    """A model class of a host. Raises ``ValueError`` where this LLaVA does not have it."""
    package = import_module(host.module(host.language_models))
    for folder in package.__path__:
        if (module := module_of(Path(folder), name)) is not None:
            return getattr(import_module(f"{package.__name__}.{module}"), name)
    raise ValueError(f"config.json names the class {name}, which the installed LLaVA does not have{_elsewhere(host)}")


def check_host_has(found: FoundHost, name: str | None, where: object) -> None:
    """Raises ``ValueError`` where the LLaVA that was found has no class of this name; imports nothing."""
    folder = found.root.joinpath(*found.host.language_models.split("."))
    if name is not None and module_of(folder, name) is None:
        raise ValueError(
            f"{where} is a {name}, a class that the LLaVA in {found.root} does not have{_elsewhere(found.host)}"
        )


def _elsewhere(host: Host) -> str:
    if host.class_prefix != Host.class_prefix:
        return ""
    return ". LLaVA-NeXT has the classes of Qwen, Mixtral and Gemma: clone it and set LLAVA_DIR"


# ---------------------------------------------------------------- loading


@contextlib.contextmanager
def loaded_as(dtype: torch.dtype) -> Iterator[None]:
    """Within it, models are loaded in this dtype. (LLaVA 1.x always asks for float16, LLaVA-NeXT by default.)"""
    token = _dtype.set(dtype)
    try:
        yield
    finally:
        _dtype.reset(token)


class _Loader:
    """Stands for a model class in a module of the host, and loads the class that a checkpoint's config names."""

    def __init__(self, host: Host, asked: type | str, target: type | None = None, config_of: str | None = None) -> None:
        """asked: the class, or its name, where it is imported when it is first asked for."""
        self._host, self._found, self._target, self._config_of = host, asked, target, config_of

    @property
    def _asked(self) -> type:
        if isinstance(self._found, str):
            self._found = find_class(self._host, self._found)
        return self._found

    def __getattr__(self, name: str) -> object:
        return getattr(self._asked, name)

    def from_pretrained(self, name_or_path: str, *args: object, **kwargs: object) -> PreTrainedModel:
        target = self._target or self._class_of(str(name_or_path))
        config, source = kwargs.get("config"), self._config_of or name_or_path
        if isinstance(config, PretrainedConfig) and not isinstance(config, target.config_class):
            kwargs["config"] = _as_class(config, target.config_class, source)
        if _dtype.get() is not None:
            kwargs["torch_dtype"] = _dtype.get()
        if kwargs.get("device_map") is not None:  # transformers refuses it without; LLaVA-Med passes False
            kwargs["low_cpu_mem_usage"] = True
        return target.from_pretrained(name_or_path, *args, **kwargs)

    def _class_of(self, name_or_path: str) -> type:
        name = class_name(read_config(name_or_path) or {}, self._host, plain=True)
        if name is None or name == self._asked.__name__:
            return self._asked
        logger.warning(
            "%s: loaded as %s, as its config.json says, not as %s, which LLaVA takes from its name",
            name_or_path,
            name,
            self._asked.__name__,
        )
        return find_class(self._host, name)


def _as_class(config: PretrainedConfig, cls: type[PretrainedConfig], source: str) -> PretrainedConfig:
    """What ``source`` says, read as ``cls``, with the values that the caller has changed since he read it."""
    read, given, right = type(config).from_pretrained(source).to_dict(), config.to_dict(), cls.from_pretrained(source)
    for key, value in given.items():
        if key != "model_type" and (key not in read or read[key] != value):
            setattr(right, key, value)
    return right


class _Tokenizers:
    """Stands for ``AutoTokenizer``: the tokenizers with which LLaVA-NeXT trains are the fast ones, unless of Llama."""

    def __init__(self, original: type) -> None:
        self._original = original

    def __getattr__(self, name: str) -> object:
        return getattr(self._original, name)

    def from_pretrained(self, *args: object, use_fast: bool = True, **kwargs: object) -> object:
        return self._original.from_pretrained(*args, **kwargs)


def _model_classes(module: ModuleType) -> dict[str, type]:
    host = host_of(module)
    return {name: value for name, value in vars(module).items() if host.model_class(name) and isinstance(value, type)}


@contextlib.contextmanager
def _classes_are(builder: ModuleType, target: type, model_path: str) -> Iterator[None]:
    """Within it, whichever class the host's loader chooses, ``target`` is loaded."""
    host = host_of(builder)
    kept = {**_model_classes(builder)}
    stand_ins: dict[str, object] = {name: _Loader(host, cls, target, model_path) for name, cls in kept.items()}
    for name in NOT_IMPORTED:
        if name not in kept and target.__name__ == name:
            stand_ins[name] = _Loader(host, target, target, model_path)
    if target.__name__ not in ("LlavaLlamaForCausalLM", "LlavaMptForCausalLM"):
        kept["AutoTokenizer"] = builder.AutoTokenizer
        stand_ins["AutoTokenizer"] = _Tokenizers(builder.AutoTokenizer)
    vars(builder).update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins.keys() - kept.keys():
            del vars(builder)[name]
        vars(builder).update(kept)


def loader_name(host: Host, cls: str, asked: str, lora: bool, on_base: bool) -> str:
    """A model name from which the host's loader chooses the right class: it looks for certain words in the name."""
    word = host.loader_name(cls)
    if on_base and not lora and word in ("llava_qwen", "llava_qwen_moe"):
        word = "llava_mistral"  # LLaVA-NeXT knows no projector on a Qwen; this way is the same, whatever the class
    marks = "_lora" if lora else "_v1.5" if "v1.5" in asked.lower() else ""
    return word + marks


def base_of(folder: Path, given: str | None) -> str | None:
    """What a LoRA or a projector was trained on: as given, else as the adapter says.

    Raises ``ValueError`` where neither tells.
    """
    if given is not None:
        return given
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        if base is not None and not isinstance(base, str):
            raise ValueError(f"{folder / ADAPTER}: base_model_name_or_path is {base!r:.80}, it should be a text")
        if base and os.path.isdir(os.path.expanduser(base)):
            logger.warning("%s is a LoRA: it is loaded on its base model %s", folder, base)
            return base
        raise ValueError(
            f"{folder} is a LoRA, as its {ADAPTER} says: give model_base, the folder that it was trained on "
            f"({f'{base:.200}, which does not exist here' if base else 'it names none'})"
        )
    if (folder / PROJECTOR).is_file() and not any(folder.glob("*.safetensors*")) and not any(folder.glob("pytorch_*")):
        raise ValueError(f"{folder} holds only the projector: give model_base, the folder that it was trained on")
    return None


def load_by_architectures(builder: ModuleType, patches: Patches) -> None:
    """Have ``load_pretrained_model`` load the class that config.json names, LoRAs of every decoder among them."""

    def load(call: Call) -> Iterator[None]:
        given = call.arguments
        model_path = given["model_path"]
        model_base, model_name = given.setdefault("model_base", None), given.setdefault("model_name", "")
        host = host_of(builder)
        name = class_name(read_config(str(model_path)) or {}, host)
        if name is None:
            yield
            return
        target = find_class(host, name)
        folder = user_path(model_path)
        model_base = base_of(folder, model_base)
        lora = (folder / ADAPTER).is_file() or (model_base is not None and "lora" in str(model_name).lower())
        asked = loader_name(host, name, str(model_name), lora, model_base is not None)
        for cls, argument, value in host.loader_arguments:
            if cls == name:
                given.setdefault(argument, value)
        with contextlib.ExitStack() as stack:
            here = self_contained(folder, host.tower_settings[0])
            place = stack.enter_context(here) if folder.is_dir() else model_path
            stack.enter_context(_classes_are(builder, target, str(place)))
            given.update(model_path=str(place), model_base=model_base, model_name=asked)
            yield
            call.result[1].config._name_or_path = str(model_path)

    called = loader(builder).__name__
    add_step(builder, "builder.load_pretrained_model", "class_by_architectures", load, patches, called)


def train_by_architectures(train: ModuleType, patches: Patches) -> None:
    """The same for ``train.py``: the decoder's config.json decides, not the words in the path to it."""
    host, classes = host_of(train), {**_model_classes(train)}
    late = [name for name in NOT_IMPORTED if host.late_models and name not in classes]
    for name, cls in [*classes.items(), *zip(late, late)]:
        patches.set(train, name, _Loader(host, cls))


# ---------------------------------------------------------------- the name that the host's scripts pass around


def name_by_architectures(original, host: Host):
    """A host's ``get_model_name_from_path``: for a checkpoint of a LLaVA the name says so, with its class.

    The scripts look for "llava" in it to see whether a model takes images, and for "v1" to choose a conversation.
    """

    @functools.wraps(original)
    def get_model_name_from_path(model_path):
        name = original(model_path)
        folder = user_path(model_path)
        content = (read_config(str(folder)) or {}) if folder.is_dir() else {}
        cls = class_name(content, host)
        if cls is None or host.class_prefix.lower() in name.lower():
            return name
        conversation = str(content.get("mm_packing_conversation") or "")
        return f"{host.loader_name(cls)}_{'v1_' if conversation in ('v1', 'vicuna_v1', 'llava_v1') else ''}{name}"

    return get_model_name_from_path
