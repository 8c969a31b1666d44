"""What a host is: a LLaVA that this package plugs into without editing it."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

DECODERS = (
    ("llama", "Llama"),
    ("qwen2", "Qwen"),
    ("qwen2moe", "QwenMoe"),
    ("qwen3", "Qwen3"),
    ("mistral", "Mistral"),
    ("mixtral", "Mixtral"),
    ("gemma", "Gemma"),
    ("mpt", "Mpt"),
)


PREPARE = "prepare_inputs_labels_for_multimodal"
"""The method in which LLaVA puts text and images together."""


@dataclass(frozen=True)
class Part:
    """A function or class of a host: its module, below the host's package, and its name."""

    module: str
    name: str
    takes: tuple[str, ...] = ()
    """The parameters of a function that this package passes or reads: one without them is another host's."""

    def parameters(self) -> tuple[str, ...]:
        return self.takes


@dataclass(frozen=True)
class TowerBuilder(Part):
    """A function that builds vision towers, and how its arguments are named."""

    config: str = "vision_tower_cfg"
    """Its parameter with the settings of the tower: LLaVA's model config, or the arguments of a training."""
    tower: str | None = None
    """Its parameter with the tower's name; None where the settings have that."""
    settings: tuple[str, str] = ("mm_vision_tower", "vision_tower")
    """What the settings call the tower's name: in a model config, in the arguments of a training."""
    defaults: tuple[tuple[str, object], ...] = ()
    """Settings that a packing tower needs and this host does not have."""
    lengths: tuple[str, str] | None = None
    """Where the settings name a list of towers: what they call the list of their numbers of tokens."""

    def parameters(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.config, self.tower)))


@dataclass(frozen=True)
class Host:
    """One kind of LLaVA: how it is found, and what its parts are called where LLaVA-NeXT's names are not kept.

    Modules are named below ``package``.
    """

    name: str
    title: str
    package: str
    """The name under which it is imported; it may have dots."""
    install: str
    recognises: Callable[[Path], bool] | None = None
    """Whether a folder is its package, from the files there: nothing of a host is imported to find it. None: where the
    file of ``arch`` is."""
    distribution: str | None = None
    """What its package is called on PyPI, where that is not the package's own name."""
    own_arguments: tuple[str, ...] = ()
    """Arguments of train.py that users know from this host and miss in others; for messages alone."""
    refused: tuple[tuple[str, str], ...] = ()
    """Modules that do not work with this package, each with the reason."""
    folder: str = ""
    """Where in a clone of its repository the package lies, if not at the top."""
    trainers: tuple[str, ...] = ("sft",)
    """What `llava-packing train` can start of it (``trainer:`` in the YAML). Empty: nothing."""
    of_trainer: tuple[tuple[str, tuple[tuple[str, object], ...]], ...] = ()
    """The fields that are others with another trainer than ``sft``."""
    native_reason: str | None = None
    """Why it has no native resolution and no text-only batches with this package; None where it has both."""

    reads_videos: bool = False
    """Whether its dataset reads videos."""

    arch: str = "model.llava_arch"
    meta_model: str = "LlavaMetaModel"
    """The class of ``arch`` that has ``initialize_vision_modules``."""
    mixin: str = "LlavaMetaForCausalLM"
    """The class of ``arch`` that has ``encode_images`` and ``prepare_inputs_labels_for_multimodal``."""
    get_tower: str = "get_vision_tower"
    """The method of both classes that returns the vision tower."""
    tower_builders: tuple[TowerBuilder, ...] = (TowerBuilder("model.multimodal_encoder.builder", "build_vision_tower"),)
    image_projector: str | None = None
    """The part of ``mm_projector`` that is for images, where it is not the whole."""
    sorts_images: bool = False
    """Whether its ``prepare_inputs_labels_for_multimodal`` sorts a list of images and videos by their dimensions."""
    keeps_padding: bool = False
    """Whether it also embeds the words that the attention mask hides."""
    joins_on_host: bool = False
    """Whether its ``prepare_inputs_labels_for_multimodal`` takes ids, mask and labels that are on the CPU, though the
    model is on a GPU."""
    gridded_images: tuple[Part, ...] = ()
    """Functions ``(image, processor, ...)`` that return ``pixel_values`` and ``grid_thw`` of an image."""
    projector_builder: Part = Part("model.multimodal_projector.builder", "build_vision_projector")
    qformer: str = "model.multimodal_resampler.qformer"
    models: str = "model"
    """The module in which all its model classes are."""
    language_models: str = "model.language_model"
    """The package that has a module for each decoder."""
    late_models: tuple[str, ...] = ()
    """Modules with classes that ``models`` leaves out; they are imported where a checkpoint names such a class."""
    class_prefix: str = "Llava"
    """Its model classes are ``<prefix><Decoder>ForCausalLM``."""
    decoders: tuple[tuple[str, str], ...] = DECODERS
    """What transformers calls the decoders that its classes are built on, and what these classes call them."""
    loader: Part = Part("model.builder", "load_pretrained_model", ("model_path", "model_base", "model_name"))
    """The function that loads a checkpoint; it returns tokenizer, model, image processor and context length."""
    loader_names: tuple[tuple[str, str], ...] = ()
    """Words with which the loader knows a model class, where that is not the class's own name with underscores."""
    loader_arguments: tuple[tuple[str, str, str], ...] = ()
    """Arguments that the loader needs for a model class: the class, the argument, its value."""
    train: str = "train.train"
    """The module that has ``train()``, the three dataclasses of arguments, and the dataset."""
    data: str | None = None
    """The module that has the dataset, where that is not ``train``."""
    dataset: str = "LazySupervisedDataset"
    trainer: Part = Part("train.llava_trainer", "LLaVATrainer")
    constants: str = "constants"
    conversation: str = "conversation"
    mm_utils: str = "mm_utils"

    def is_in(self, root: Path) -> bool:
        """Whether the package in the folder ``root`` has its files."""
        if self.recognises is None:
            return root.joinpath(*self.arch.split(".")).with_suffix(".py").is_file()
        return self.recognises(root)

    def module(self, name: str) -> str:
        """The full name of one of its modules: ``host.module(host.arch)``."""
        return f"{self.package}.{name}"

    def model_class(self, name: str) -> bool:
        """Whether a class of this name is one of its models."""
        return re.fullmatch(rf"{self.class_prefix}\w*ForCausalLM", name) is not None

    def class_for(self, decoder: str) -> str | None:
        """The name of its model class for a decoder, by transformers' name or its own (``Qwen2Moe``, ``qwen_moe``)."""
        wanted = decoder.lower().replace("_", "")
        for own, word in self.decoders:
            if wanted in (own, word.lower()):
                return f"{self.class_prefix}{word}ForCausalLM"
        return None

    def loader_name(self, cls: str) -> str:
        """The word in a model's name by which the loader knows a class: ``llava_qwen_moe``."""
        words = re.findall("[A-Z][a-z0-9]*", cls.removeprefix(self.class_prefix).removesuffix("ForCausalLM"))
        return dict(self.loader_names).get(cls) or "_".join([self.class_prefix, *words]).lower()

    def with_trainer(self, name: str) -> Host:
        """This host as it is with one of its ``trainers``. Raises ``ValueError`` for another."""
        if name not in self.trainers:
            raise ValueError(f"{self.title} has no trainer {name!r}, but {', '.join(self.trainers) or 'none'}")
        return replace(self, **dict(dict(self.of_trainer).get(name, ())))

    def owns(self, module: str) -> bool:
        """Whether a module of this full name is the host's."""
        return module == self.package or module.startswith(f"{self.package}.")

    @property
    def tower_settings(self) -> tuple[str, str]:
        """What its model config and its training arguments call the tower's name."""
        return self.tower_builders[0].settings

    def modules(self) -> dict[str, str]:
        """The full names of its modules, by the words in which compat patches say where they look."""
        return {
            "package": self.package,
            "arch": self.module(self.arch),
            "models": self.module(self.models),
            "qformer": self.module(self.qformer),
            "loader": self.module(self.loader.module),
            "train": self.module(self.train),
            "trainer": self.module(self.trainer.module),
            "mm_utils": self.module(self.mm_utils),
        }


def misfits(host: Host, root: Path) -> list[str]:
    """What of the package in ``root`` has other signatures than ``host``: one line each. Read, not imported."""
    prepare = ("input_ids", "attention_mask", "labels", "images")
    expected = [(part.module, "", part.name, part.parameters()) for part in (*host.tower_builders, host.loader)]
    expected.append((host.arch, f"{host.meta_model}.", "initialize_vision_modules", ("model_args",)))
    if host.native_reason is None:
        expected.append((host.arch, f"{host.mixin}.", PREPARE, prepare))
        expected.append((host.arch, f"{host.mixin}.", "encode_images", ("images",)))
    lines = []
    for module, owner, name, takes in expected:
        file = root.joinpath(*module.split(".")).with_suffix(".py")
        if not file.is_file():
            lines.append(f"there is no {file.relative_to(root)}")
            continue
        found = _parameters(file, owner.rstrip("."), name)
        if found is None:
            lines.append(f"{file.relative_to(root)} has no {owner}{name}")
        elif lacking := [word for word in takes if word not in found]:
            lines.append(f"{owner}{name}({', '.join(found)}) takes no {' and no '.join(lacking)}")
    return list(dict.fromkeys(lines))


def _parameters(file: Path, owner: str, name: str) -> list[str] | None:
    """The parameters of a function of a source file, or of class ``owner`` in it; None where there is none."""
    nodes: list[ast.stmt] = syntax(file).body
    if owner:
        nodes = next((n.body for n in nodes if isinstance(n, ast.ClassDef) and n.name == owner), [])
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            a = node.args
            return [word.arg for word in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return None


@dataclass(frozen=True)
class FoundHost:
    """A host on this machine: its kind, the folder of its package, and its version as it states it itself."""

    host: Host
    root: Path
    version: str

    @property
    def package(self) -> str:
        return self.host.package

    def file(self, module: str) -> Path:
        """The source file of one of its modules: ``found.file(found.host.train)``."""
        return self.root.joinpath(*module.split(".")).with_suffix(".py")

    def __str__(self) -> str:
        return f"{self.host.title} {self.version} ({self.root})"


def syntax(file: Path) -> ast.Module:
    """The syntax tree of a host's source file, which nobody may change."""
    return _parsed(file.read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> ast.Module:
    """Several checks look at one train.py."""
    return ast.parse(text)


@dataclass(frozen=True)
class Argument:
    """One argument of a dataclass as its source states it: the text of its annotation and of its default."""

    name: str
    group: str
    annotation: str
    default: str


GROUPS = ("ModelArguments", "DataArguments", "TrainingArguments")


def dataclass_arguments(file: Path, name: str) -> dict[str, Argument]:
    """The fields of dataclass ``name`` in a source file, read without running it (milliseconds, no torch).

    Raises ``ValueError`` where the file has no such class.
    """
    for node in syntax(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            fields = (n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))
            return {
                f.target.id: Argument(
                    f.target.id, name, ast.unparse(f.annotation), ast.unparse(f.value) if f.value else ""
                )
                for f in fields
            }
    raise ValueError(f"{file} defines no class {name}")


def host_arguments(found: FoundHost) -> dict[str, Argument]:
    """Every argument of the host's own three dataclasses, including those of ``transformers.TrainingArguments``.

    Raises ``ValueError`` if transformers is not installed, or a dataclass is missing.
    """
    train = found.file(found.host.train)
    arguments: dict[str, Argument] = {}
    base = find_spec("transformers")
    if base is None or not base.submodule_search_locations:
        raise ValueError("transformers is not installed")
    arguments.update(
        dataclass_arguments(Path(base.submodule_search_locations[0]) / "training_args.py", "TrainingArguments")
    )
    for group in GROUPS:
        arguments.update(dataclass_arguments(train, group))
    return arguments
