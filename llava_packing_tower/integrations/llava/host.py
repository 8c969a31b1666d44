"""What a host is: a LLaVA that this package plugs into without editing it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """A function or class of a host: its module, below the host's package, and its name."""

    module: str
    name: str


@dataclass(frozen=True)
class TowerBuilder(Part):
    """A function that builds a vision tower, and how its arguments are named."""

    config: str = "vision_tower_cfg"
    """Its parameter with the settings of the tower: LLaVA's model config, or the arguments of a training."""
    tower: str | None = None
    """Its parameter with the tower's name; None where the settings have that as ``mm_vision_tower`` or
    ``vision_tower``."""


@dataclass(frozen=True)
class Host:
    """One kind of LLaVA: how it is found, and what its parts are called where LLaVA-NeXT's names are not kept.

    ``recognises`` looks at files only: nothing of the host is imported to find it. Modules are named below ``package``.
    """

    name: str
    title: str
    package: str
    """The name under which it is imported; it may have dots."""
    recognises: Callable[[Path], bool]
    install: str
    distribution: str | None = None
    """What its package is called on PyPI, where that is not the package's own name."""
    own_arguments: tuple[str, ...] = ()
    """Arguments of train.py that users know from this host and miss in others; for messages alone."""
    refused: tuple[tuple[str, str], ...] = ()
    """Modules that do not work with this package, each with the reason."""

    reads_videos: bool = False
    """Whether its dataset reads videos."""

    arch: str = "model.llava_arch"
    meta_model: str = "LlavaMetaModel"
    """The class of ``arch`` that has ``initialize_vision_modules``."""
    mixin: str = "LlavaMetaForCausalLM"
    """The class of ``arch`` that has ``encode_images`` and ``prepare_inputs_labels_for_multimodal``."""
    tower_builders: tuple[TowerBuilder, ...] = (TowerBuilder("model.multimodal_encoder.builder", "build_vision_tower"),)
    projector_builder: Part = Part("model.multimodal_projector.builder", "build_vision_projector")
    qformer: str = "model.multimodal_resampler.qformer"
    models: str = "model"
    """The module in which all its model classes are."""
    language_models: str = "model.language_model"
    """The package that has a module for each decoder."""
    loader: str = "model.builder"
    """The module that has ``load_pretrained_model``, which is called so everywhere."""
    train: str = "train.train"
    """The module that has ``train()``, the three dataclasses of arguments, and the dataset."""
    dataset: str = "LazySupervisedDataset"
    trainer: Part = Part("train.llava_trainer", "LLaVATrainer")
    constants: str = "constants"
    conversation: str = "conversation"
    mm_utils: str = "mm_utils"

    def module(self, name: str) -> str:
        """The full name of one of its modules: ``host.module(host.arch)``."""
        return f"{self.package}.{name}"

    def owns(self, module: str) -> bool:
        """Whether a module of this full name is the host's."""
        return module == self.package or module.startswith(f"{self.package}.")

    def modules(self) -> dict[str, str]:
        """The full names of its modules, by the words in which compat patches say where they look."""
        return {
            "package": self.package,
            "arch": self.module(self.arch),
            "models": self.module(self.models),
            "qformer": self.module(self.qformer),
            "loader": self.module(self.loader),
            "train": self.module(self.train),
            "trainer": self.module(self.trainer.module),
            "mm_utils": self.module(self.mm_utils),
        }


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
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
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
    """Every argument of the host's own three dataclasses, those of ``transformers.TrainingArguments`` included."""
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
