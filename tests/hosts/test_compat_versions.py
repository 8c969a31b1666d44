"""Compat patches for newer versions of transformers and DeepSpeed: each finds its defect alone and removes it.

Where the installed version does not have the defect, the test makes it; the tests marked "newest" have the real one.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import pickle
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
import transformers.pytorch_utils
from compat_modules import module_from, patched, stand_in_host
from conftest import FIVE
from transformers import Trainer, TrainingArguments

from llava_packing_tower.integrations.llava import compat
from llava_packing_tower.integrations.llava.compat import transformers_imports
from llava_packing_tower.integrations.llava.patcher import Patches

pytestmark = pytest.mark.newest


# ---------------------------------------------------------------- names


@pytest.fixture
def unrun(tmp_path):
    """A module as a "before" patch sees it: made, not run."""

    def make(text: str) -> ModuleType:
        file = tmp_path / "unrun.py"
        file.write_text(text)
        return importlib.util.module_from_spec(importlib.util.spec_from_file_location("unrun", file))

    return make


@pytest.mark.parametrize("patch", ["trainer_names", "resampler_names"])
def test_names_are_put_back_for_the_host_and_taken_away_again(unrun, monkeypatch, patch):
    import transformers.trainer

    monkeypatch.delattr(transformers.trainer, "ALL_LAYERNORM_LAYERS", raising=False)
    monkeypatch.delattr(transformers.trainer, "GradientAccumulationPlugin", raising=False)
    module = unrun(
        "from transformers.trainer import Trainer, ALL_LAYERNORM_LAYERS, GradientAccumulationPlugin\n"
        "from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS as same\nfrom transformers import NoSuchThing"
    )
    with pytest.raises(ImportError, match="ALL_LAYERNORM_LAYERS"):
        module.__spec__.loader.exec_module(module)
    patches = patched(patch, module)
    with pytest.raises(ImportError, match="NoSuchThing"):  # a name of transformers itself is not the patch's business
        module.__spec__.loader.exec_module(module)
    assert module.ALL_LAYERNORM_LAYERS is module.same
    assert module.GradientAccumulationPlugin.__module__.startswith("accelerate.")
    patches.undo()
    assert not hasattr(transformers.trainer, "GradientAccumulationPlugin")
    assert patched(patch, unrun("from transformers.trainer import Trainer")) is None


def test_a_name_that_went_nowhere_known_is_an_error_that_says_so(unrun):
    module = unrun("from transformers.trainer import Trainer, SomethingElse")
    with pytest.raises(
        ImportError, match=r"unrun imports SomethingElse from transformers\.trainer.*no compat patch knows"
    ):
        patched("trainer_names", module)


def test_every_moved_name_is_found():
    for (_, name), places in transformers_imports.MOVED.items():
        assert callable(transformers_imports._found(name, places)) or isinstance(
            transformers_imports._found(name, places), list
        )


@pytest.mark.parametrize(
    ("heads", "n_heads", "pruned", "left", "rows"),
    [
        ([1], 3, set(), {1}, [0, 2]),
        ([0, 2, 5], 4, {1, 5}, {0, 2}, [2, 3]),  # of 0..5, 1 and 5 are gone: 0 2 3 4 remain, and 0 and 2 go
    ],
)
def test_heads_to_prune(heads, n_heads, pruned, left, rows):
    found, index = transformers_imports.find_pruneable_heads_and_indices(heads, n_heads, 2, pruned)
    assert found == left and index.tolist() == [2 * row + i for row in rows for i in (0, 1)]
    theirs = getattr(transformers.pytorch_utils, "find_pruneable_heads_and_indices", None)
    if theirs is not None:
        expected = theirs(heads, n_heads, 2, pruned)
        assert expected[0] == found and torch.equal(expected[1], index)


# ---------------------------------------------------------------- the trainer

TRAINER = """
from transformers import Trainer
class LLaVATrainer(Trainer):
{body}
"""


@pytest.fixture
def trainer_with(tmp_path, monkeypatch):
    numbers = itertools.count()

    def make(body: str, more: str = "") -> ModuleType:
        text = TRAINER.format(body=textwrap.indent(textwrap.dedent(body), "    ")) + more
        return module_from(tmp_path, monkeypatch, f"fake.train.llava_trainer{next(numbers)}", text)

    return make


ACCELERATOR = """
def create_accelerator_and_postprocess(self):
    self.accelerator = Accelerator(dispatch_batches=self.args.dispatch_batches, split_batches=1)
"""


def test_accelerator_arguments(trainer_with, monkeypatch):
    import accelerate

    fields = {**TrainingArguments.__dataclass_fields__, "dispatch_batches": None}
    monkeypatch.setattr(TrainingArguments, "__dataclass_fields__", fields)

    class Accepting:
        def __init__(self, dispatch_batches=None):
            pass

    class Refusing:
        def __init__(self, split_batches=None):
            pass

    host = trainer_with(ACCELERATOR)
    monkeypatch.setattr(accelerate, "Accelerator", Accepting)
    assert patched("accelerator_arguments", host) is None
    monkeypatch.setattr(accelerate, "Accelerator", Refusing)
    patches = patched("accelerator_arguments", host)
    assert host.LLaVATrainer.create_accelerator_and_postprocess is Trainer.create_accelerator_and_postprocess
    patches.undo()
    assert "create_accelerator_and_postprocess" in vars(host.LLaVATrainer)
    monkeypatch.setattr(accelerate, "Accelerator", Accepting)
    del fields["dispatch_batches"]
    assert patched("accelerator_arguments", host) is not None
    assert patched("accelerator_arguments", trainer_with("pass")) is None


def test_save_metrics(trainer_with, monkeypatch):
    host = trainer_with(
        "def _save_checkpoint(self, model, trial, metrics=None):\n"
        "    return super(LLaVATrainer, self)._save_checkpoint(model, trial, metrics)"
    )
    trainer = host.LLaVATrainer.__new__(host.LLaVATrainer)
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model, trial, metrics=None: (model, trial, metrics))
    assert patched("save_metrics", host) is None
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model, trial: (model, trial))
    with pytest.raises(TypeError):
        trainer._save_checkpoint(1, 2)
    patches = patched("save_metrics", host)
    assert trainer._save_checkpoint(1, 2) == (1, 2)
    patches.undo()
    with pytest.raises(TypeError):
        trainer._save_checkpoint(1, 2)
    assert patched("save_metrics", trainer_with("pass")) is None


def test_sampler_dataset(trainer_with, monkeypatch):
    own = "def _get_train_sampler(self):\n    return 'mine'"
    host = trainer_with(own)
    trainer = host.LLaVATrainer.__new__(host.LLaVATrainer)
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self: None)
    assert patched("sampler_dataset", host) is None
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, train_dataset=None: None)
    with pytest.raises(TypeError):
        trainer._get_train_sampler([1])
    assert patched("sampler_dataset", host) is not None
    assert trainer._get_train_sampler([1]) == "mine" == trainer._get_train_sampler()
    # LLaVA-NeXT calls its sampler from a loader of its own, without the dataset.
    assert patched("sampler_dataset", trainer_with(own + "\ndef get_train_dataloader(self): pass")) is None


def test_sampler_dataset_of_every_trainer_of_the_module(trainer_with, monkeypatch):
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, train_dataset=None: None)
    other = "\nclass LLaVADPOTrainer(Trainer):\n    def _get_train_sampler(self):\n        return 'other'\n"
    host = trainer_with("def get_train_dataloader(self): pass\ndef _get_train_sampler(self): return 'own'", other)
    assert patched("sampler_dataset", host) is not None
    assert host.LLaVADPOTrainer._get_train_sampler(None, [1]) == "other"
    with pytest.raises(TypeError):
        host.LLaVATrainer._get_train_sampler(None, [1])  # its own loader does not pass one


class Drawn(torch.utils.data.Sampler):
    """Draws from torch's own numbers, as LLaVA's does."""

    def __iter__(self):
        return iter(torch.randperm(7).tolist())

    def __len__(self):
        return 7


class Weight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, x):
        self.seen += x.tolist()
        return {"loss": (self.weight * x).sum()}


def test_epoch_orders(trainer_with, tmp_path, monkeypatch):
    """A resumed run trains on what is left of its epoch, and on the next one as if it had not been interrupted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    host = trainer_with("def _get_train_sampler(self, *given):\n    return self.order")
    if patched("epoch_orders", host) is None:  # transformers draws them itself
        assert not FIVE
        return
    given = {"num_train_epochs": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 6}
    args = TrainingArguments(str(tmp_path / "out"), **given, use_cpu=True, report_to=[], disable_tqdm=True)

    def run(start):
        model = Weight()
        data = [{"x": torch.tensor(float(number))} for number in range(7)]
        trainer = host.LLaVATrainer(model=model, args=args, train_dataset=data)
        trainer.order = Drawn()
        trainer.train(resume_from_checkpoint=start)
        return model.seen

    whole = run(None)
    assert len(whole) == 28 and all(sorted(whole[at : at + 7]) == list(range(7)) for at in range(0, 28, 7))
    assert run(str(tmp_path / "out" / "checkpoint-6")) == whole[11:]


SEEDS = "\nfrom transformers.trainer_utils import seed_worker\n"


def test_worker_seeds(trainer_with, monkeypatch):
    """Two ranks of two workers: four seeds, the same again in the next run, and by every way to start a worker."""
    import transformers.trainer_utils

    def with_numbers(worker_id: int, num_workers: int, rank: int) -> None:
        transformers.set_seed(num_workers * rank + torch.initial_seed() % 2**32)

    monkeypatch.setattr(transformers.trainer_utils, "seed_worker", lambda _: None)
    assert patched("worker_seeds", trainer_with("pass", SEEDS)) is None
    monkeypatch.setattr(transformers.trainer_utils, "seed_worker", with_numbers)
    host = trainer_with("pass", SEEDS)
    with pytest.raises(TypeError):
        host.seed_worker(0)
    patches = patched("worker_seeds", host)
    assert pickle.loads(pickle.dumps(host.seed_worker)) is host.seed_worker  # a worker that is spawned

    def seeds(rank: int) -> list[int]:
        monkeypatch.setenv("RANK", str(rank))
        draw = torch.Generator().manual_seed(5)
        return [
            int(seed)
            for seed in torch.utils.data.DataLoader(
                Seeds(), num_workers=2, worker_init_fn=host.seed_worker, generator=draw, multiprocessing_context="fork"
            )
        ]

    first, second = seeds(0), seeds(1)
    assert len({*first, *second}) == 4 and seeds(0) == first and second == [seed + 2 for seed in first]
    patches.undo()
    assert host.seed_worker is with_numbers


class Seeds(torch.utils.data.Dataset):
    """Two samples, one for each worker: what the worker was seeded with."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return torch.initial_seed()


def test_optimizer_model(trainer_with, monkeypatch):
    host = trainer_with("def create_optimizer(self):\n    return self.model")
    trainer = host.LLaVATrainer.__new__(host.LLaVATrainer)
    trainer.model = "plain"
    monkeypatch.setattr(Trainer, "create_optimizer", lambda self: None)
    assert patched("optimizer_model", host) is None
    monkeypatch.setattr(Trainer, "create_optimizer", lambda self, model=None: None)
    patches = patched("optimizer_model", host)
    assert trainer.create_optimizer("wrapped") == "wrapped"
    assert trainer.create_optimizer() == trainer.model == "plain"
    patches.undo()
    with pytest.raises(TypeError):
        trainer.create_optimizer("wrapped")


@pytest.mark.newest
def test_ddp_adapters(trainer_with, monkeypatch):
    """transformers has DDP look for unused weights for what is none of its models."""
    host = trainer_with("pass")
    monkeypatch.setattr(Trainer, "__init__", lambda self, model=None, args=None: None)
    patches = patched("ddp_adapters", host)
    adapted = SimpleNamespace(get_base_model=None)
    for model, checkpointing, given, expected in (
        (adapted, True, None, False),
        (adapted, True, True, True),
        (adapted, False, None, None),
        (SimpleNamespace(), True, None, None),
    ):
        args = SimpleNamespace(gradient_checkpointing=checkpointing, ddp_find_unused_parameters=given)
        host.LLaVATrainer(model=model, args=args)
        assert args.ddp_find_unused_parameters is expected
    patches.undo()


def test_tokenizer_argument(trainer_with, monkeypatch):
    host = trainer_with("pass")
    monkeypatch.setattr(Trainer, "__init__", lambda self, model=None, tokenizer=None: None)
    assert patched("tokenizer_argument", host) is None
    seen = []
    new = lambda self, model=None, processing_class=None: seen.append(processing_class)  # noqa: E731
    monkeypatch.setattr(Trainer, "__init__", new)

    @functools.wraps(new)  # as transformers 4.46 deprecates it
    def deprecating(*args, **kwargs):
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        return new(*args, **kwargs)

    monkeypatch.setattr(Trainer, "__init__", deprecating)
    assert patched("tokenizer_argument", host) is None
    monkeypatch.setattr(Trainer, "__init__", new)
    patches = patched("tokenizer_argument", host)
    host.LLaVATrainer(model=1, tokenizer="t")
    host.LLaVATrainer(model=1, processing_class="p")
    assert seen == ["t", "p"]
    patches.undo()
    with pytest.raises(TypeError):
        host.LLaVATrainer(model=1, tokenizer="t")


def test_group_by_length(trainer_with, monkeypatch):
    fields = {name: f for name, f in TrainingArguments.__dataclass_fields__.items() if name != "group_by_length"}
    monkeypatch.setattr(TrainingArguments, "__dataclass_fields__", {**fields, "group_by_length": None})
    host = trainer_with("def _get_train_sampler(self):\n    return self.args.group_by_length")
    assert patched("group_by_length", host) is None
    monkeypatch.setattr(TrainingArguments, "__dataclass_fields__", fields)
    monkeypatch.delattr(TrainingArguments, "group_by_length", raising=False)
    assert patched("group_by_length", trainer_with("pass")) is None
    patches = patched("group_by_length", host)
    arguments = TrainingArguments.__new__(TrainingArguments)
    for strategy, grouped in (("random", False), ("group_by_length", True)):
        object.__setattr__(arguments, "train_sampling_strategy", strategy)
        assert host.LLaVATrainer._get_train_sampler(SimpleNamespace(args=arguments)) is grouped
    patches.undo()
    assert not hasattr(TrainingArguments, "group_by_length")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_bf16_on_cpu(tmp_path, monkeypatch):
    def arguments(condition: str, number: int) -> ModuleType:
        text = f"""
        import torch
        def is_torch_bf16_gpu_available(): return False
        def check(use_cpu=False):
            if {condition}: raise ValueError("bf16/gpu")
        """
        return module_from(tmp_path, monkeypatch, f"fake_arguments{number}", textwrap.dedent(text))

    refusing = arguments("not use_cpu and not is_torch_bf16_gpu_available()", 1)
    with pytest.raises(ValueError, match="bf16/gpu"):
        refusing.check()
    patches = patched("bf16_on_cpu", refusing)
    refusing.check()
    patches.undo()
    with pytest.raises(ValueError, match="bf16/gpu"):
        refusing.check()
    asking = arguments("torch.cuda.is_available() and not is_torch_bf16_gpu_available()", 2)
    assert patched("bf16_on_cpu", asking) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert patched("bf16_on_cpu", refusing) is None


# ---------------------------------------------------------------- what is written of them


def test_the_documentation_names_every_patch():
    text = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    for name, item in compat.load_all().items():
        assert name in rows, f"docs/hosts.md has no row for compat patch {name}"
        assert item.reason in rows[name] and (item.issue or "| - |") in rows[name]


# ---------------------------------------------------------------- what is left alone


def test_a_defect_that_is_left_is_known(tmp_path, monkeypatch):
    from llava_packing_tower.utils.import_hooks import ImportHooks

    monkeypatch.setattr(compat, "COMPAT_PATCHES", {})
    monkeypatch.setattr(compat, "PATCH_MODULES", ())
    monkeypatch.setattr(compat, "_applied", {})
    monkeypatch.setattr(compat, "_left", {})
    for name, sick in (("one", True), ("two", False)):
        function = lambda module, patches: pytest.fail("applied")  # noqa: E731
        function.__name__ = name
        compat.compat_patch(module="left_host.part", reason="x", defect=lambda module, sick=sick: sick)(function)
    monkeypatch.setenv(compat.DISABLE_ENV, "one,two")
    hooks, patches = ImportHooks(), Patches()
    compat.install(stand_in_host("left_host"), hooks, patches)
    monkeypatch.setitem(sys.modules, "left_host.part", ModuleType("left_host.part"))
    sys.modules["left_host.part"].__spec__ = None
    for callback in hooks._after["left_host.part"]:
        callback(sys.modules["left_host.part"])
    assert compat.left() == ("one",) and compat.applied() == ()
    patches.undo()
    assert compat.left() == ()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_library_is_mended_once_for_all_hosts(tmp_path, monkeypatch, loaded):
    """Two hosts in one process: what wraps a function of DeepSpeed must not wrap it twice."""
    from llava_packing_tower.utils.import_hooks import ImportHooks

    for name in ("sicklibrary", "firsthost", "secondhost"):
        (tmp_path / f"{name}.py").write_text("VALUE = [1]" if name == "sicklibrary" else "import sicklibrary")
    monkeypatch.syspath_prepend(str(tmp_path))
    for attribute, value in (("COMPAT_PATCHES", {}), ("PATCH_MODULES", ()), ("_applied", {}), ("_watched", set())):
        monkeypatch.setattr(compat, attribute, value)

    @compat.compat_patch(module="sicklibrary", reason="x", defect=lambda module: True)
    def cure(module, patches):
        patches.set(module, "VALUE", [*module.VALUE, 2])

    hooks, patches = ImportHooks(), Patches()
    hooks.install()
    try:
        if loaded:
            assert importlib.import_module("sicklibrary").VALUE == [1]
        for _ in range(2):  # and again after everything was taken back
            for host in ("firsthost", "secondhost"):
                compat.install(stand_in_host(host), hooks, patches)
            importlib.import_module("firsthost")
            importlib.import_module("secondhost")
            assert sys.modules["sicklibrary"].VALUE == [1, 2]
            patches.undo()
            assert sys.modules["sicklibrary"].VALUE == [1]
            hooks.remove()
            hooks.install()
            for name in ("firsthost", "secondhost", *(() if loaded else ("sicklibrary",))):
                monkeypatch.delitem(sys.modules, name)
    finally:
        hooks.remove()
        sys.modules.pop("sicklibrary", None)
