"""Mends for newer versions of transformers and DeepSpeed: each finds its defect, and only that, and takes it away.

Where the installed version does not have the defect, the test makes it; the tests marked "newest" have the real one.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
import transformers.pytorch_utils
from test_mends import mended, module_from
from transformers import PretrainedConfig, Trainer, TrainingArguments

from llava_packing_tower.hosts import mends
from llava_packing_tower.hosts.mends import names
from llava_packing_tower.hosts.patches import Patches
from llava_packing_tower.tower import HEVCViTPackingVisionTower

FIVE = int(transformers.__version__.split(".")[0]) >= 5
pytestmark = pytest.mark.newest
only_five = pytest.mark.skipif(not FIVE, reason="needs transformers 5")


# ---------------------------------------------------------------- names


@pytest.fixture
def unrun(tmp_path):
    """A module as a "before" mend sees it: made, not run."""

    def make(text: str) -> ModuleType:
        file = tmp_path / "unrun.py"
        file.write_text(text)
        return importlib.util.module_from_spec(importlib.util.spec_from_file_location("unrun", file))

    return make


@pytest.mark.parametrize("mend", ["trainer_names", "resampler_names"])
def test_names_are_put_back_for_the_host_and_taken_away_again(unrun, monkeypatch, mend):
    import transformers.trainer

    monkeypatch.delattr(transformers.trainer, "ALL_LAYERNORM_LAYERS", raising=False)
    monkeypatch.delattr(transformers.trainer, "GradientAccumulationPlugin", raising=False)
    module = unrun(
        "from transformers.trainer import Trainer, ALL_LAYERNORM_LAYERS, GradientAccumulationPlugin\n"
        "from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS as same\nfrom transformers import NoSuchThing"
    )
    with pytest.raises(ImportError, match="ALL_LAYERNORM_LAYERS"):
        module.__spec__.loader.exec_module(module)
    patches = mended(mend, module)
    with pytest.raises(ImportError, match="NoSuchThing"):  # a name of transformers itself is not the mend's business
        module.__spec__.loader.exec_module(module)
    assert module.ALL_LAYERNORM_LAYERS is module.same
    assert module.GradientAccumulationPlugin.__module__.startswith("accelerate.")
    patches.undo()
    assert not hasattr(transformers.trainer, "GradientAccumulationPlugin")
    assert mended(mend, unrun("from transformers.trainer import Trainer")) is None


def test_a_name_that_went_nowhere_known_is_an_error_that_says_so(unrun):
    module = unrun("from transformers.trainer import Trainer, SomethingElse")
    with pytest.raises(ImportError, match=r"unrun imports SomethingElse from transformers\.trainer.*no mend knows"):
        mended("trainer_names", module)


def test_every_moved_name_is_found():
    for (_, name), places in names.MOVED.items():
        assert callable(names._found(name, places)) or isinstance(names._found(name, places), list)


@pytest.mark.parametrize(
    ("heads", "n_heads", "pruned", "left", "rows"),
    [
        ([1], 3, set(), {1}, [0, 2]),
        ([0, 2, 5], 4, {1, 5}, {0, 2}, [2, 3]),  # of 0..5, 1 and 5 are gone: 0 2 3 4 remain, and 0 and 2 go
    ],
)
def test_heads_to_prune(heads, n_heads, pruned, left, rows):
    found, index = names.find_pruneable_heads_and_indices(heads, n_heads, 2, pruned)
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

    def make(body: str) -> ModuleType:
        text = TRAINER.format(body=textwrap.indent(textwrap.dedent(body), "    "))
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
    assert mended("accelerator_arguments", host) is None
    monkeypatch.setattr(accelerate, "Accelerator", Refusing)
    patches = mended("accelerator_arguments", host)
    assert host.LLaVATrainer.create_accelerator_and_postprocess is Trainer.create_accelerator_and_postprocess
    patches.undo()
    assert "create_accelerator_and_postprocess" in vars(host.LLaVATrainer)
    monkeypatch.setattr(accelerate, "Accelerator", Accepting)
    del fields["dispatch_batches"]
    assert mended("accelerator_arguments", host) is not None
    assert mended("accelerator_arguments", trainer_with("pass")) is None


def test_save_metrics(trainer_with, monkeypatch):
    host = trainer_with(
        "def _save_checkpoint(self, model, trial, metrics=None):\n"
        "    return super(LLaVATrainer, self)._save_checkpoint(model, trial, metrics)"
    )
    trainer = host.LLaVATrainer.__new__(host.LLaVATrainer)
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model, trial, metrics=None: (model, trial, metrics))
    assert mended("save_metrics", host) is None
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda self, model, trial: (model, trial))
    with pytest.raises(TypeError):
        trainer._save_checkpoint(1, 2)
    patches = mended("save_metrics", host)
    assert trainer._save_checkpoint(1, 2) == (1, 2)
    patches.undo()
    with pytest.raises(TypeError):
        trainer._save_checkpoint(1, 2)
    assert mended("save_metrics", trainer_with("pass")) is None


def test_sampler_dataset(trainer_with, monkeypatch):
    own = "def _get_train_sampler(self):\n    return 'mine'"
    host = trainer_with(own)
    trainer = host.LLaVATrainer.__new__(host.LLaVATrainer)
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self: None)
    assert mended("sampler_dataset", host) is None
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, train_dataset=None: None)
    with pytest.raises(TypeError):
        trainer._get_train_sampler([1])
    assert mended("sampler_dataset", host) is not None
    assert trainer._get_train_sampler([1]) == "mine" == trainer._get_train_sampler()
    # LLaVA-NeXT calls its sampler from a loader of its own, without the dataset.
    assert mended("sampler_dataset", trainer_with(own + "\ndef get_train_dataloader(self): pass")) is None


def test_tokenizer_argument(trainer_with, monkeypatch):
    host = trainer_with("pass")
    monkeypatch.setattr(Trainer, "__init__", lambda self, model=None, tokenizer=None: None)
    assert mended("tokenizer_argument", host) is None
    seen = []
    new = lambda self, model=None, processing_class=None: seen.append(processing_class)  # noqa: E731
    monkeypatch.setattr(Trainer, "__init__", new)
    patches = mended("tokenizer_argument", host)
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
    assert mended("group_by_length", host) is None
    monkeypatch.setattr(TrainingArguments, "__dataclass_fields__", fields)
    monkeypatch.delattr(TrainingArguments, "group_by_length", raising=False)
    assert mended("group_by_length", trainer_with("pass")) is None
    patches = mended("group_by_length", host)
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
    patches = mended("bf16_on_cpu", refusing)
    refusing.check()
    patches.undo()
    with pytest.raises(ValueError, match="bf16/gpu"):
        refusing.check()
    asking = arguments("torch.cuda.is_available() and not is_torch_bf16_gpu_available()", 2)
    assert mended("bf16_on_cpu", asking) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert mended("bf16_on_cpu", refusing) is None


# ---------------------------------------------------------------- models, tokenisation, loader


@only_five
def test_rope_scaling_none(tmp_path, monkeypatch):
    from transformers import Qwen2Config

    def host(line: str) -> ModuleType:
        (tmp_path / "fake" / "model" / "language_model").mkdir(parents=True, exist_ok=True)
        (tmp_path / "fake" / "model" / "language_model" / "llava_x.py").write_text(line)
        return module_from(tmp_path, monkeypatch, "fake.model.__init__", "")

    assert mended("rope_scaling_none", host("# nothing")) is None
    patches = mended("rope_scaling_none", host("config.rope_scaling = None"))
    config = Qwen2Config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 12345.0})
    config.rope_scaling = None
    assert config.rope_parameters == {"rope_theta": 12345.0, "rope_type": "default"}
    config.rope_scaling = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1.0}
    assert config.rope_parameters["factor"] == 3.0
    patches.undo()
    config.rope_scaling = None
    assert config.rope_parameters is None


@pytest.mark.skipif(FIVE, reason="transformers 4")
def test_rope_scaling_none_is_no_defect_of_transformers_4(tmp_path, monkeypatch):
    (tmp_path / "fake" / "model" / "language_model").mkdir(parents=True)
    (tmp_path / "fake" / "model" / "language_model" / "llava_x.py").write_text("config.rope_scaling = None")
    assert not isinstance(vars(PretrainedConfig).get("rope_scaling"), property)
    assert mended("rope_scaling_none", module_from(tmp_path, monkeypatch, "fake.model.__init__", "")) is None


PREPROCESS = """
import copy
def preprocess_qwen(sources, tokenizer, has_image=False):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    start, end = tokenizer.additional_special_tokens_ids
    tokenizer.chat_template = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
    ids = []
    for source in sources:
        ids += tokenizer.apply_chat_template([{"role": "user", "content": source}])
    return ids, (start, end), tokenizer.convert_tokens_to_ids("<image>")
"""


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, additional_special_tokens=["<s>", "</s>"])


def test_chat_template_ids(tmp_path, monkeypatch, tokenizer):
    """The same function gives on transformers 5, mended, what it gives on transformers 4 as it is."""
    pytest.importorskip("jinja2")
    train = module_from(tmp_path, monkeypatch, "fake.train.train", PREPROCESS)
    kind = type(tokenizer)
    patches = mended("chat_template_ids", train)
    assert (patches is not None) == FIVE
    ids, ends, image = train.preprocess_qwen(["a <image> b", "b"], tokenizer)
    assert (ids, ends, image) == ([3, 1, 5, 2, 4, 3, 2, 4], (3, 4), 5)
    assert type(tokenizer) is kind and not hasattr(kind, "_made")  # the caller's own is as it was
    if FIVE:
        patches.undo()
        with pytest.raises(AttributeError):
            train.preprocess_qwen(["a"], tokenizer)


LOADER = """
import torch
def load_pretrained_model(model_path, model_base, model_name, device_map="auto"):
    model = make()
    tower = model.get_vision_tower()
    if device_map != "auto":
        vision_tower = tower
        vision_tower.to(device="cuda", dtype=torch.float16)
    return None, model, None, 1
"""


def test_tower_half(tmp_path, monkeypatch, golden):
    arguments = SimpleNamespace(mm_vision_select_layer=-1)
    tower = HEVCViTPackingVisionTower(str(golden / "hevc_packing_tower"), arguments)
    projector = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    inner = SimpleNamespace(mm_projector=projector)
    model = SimpleNamespace(get_vision_tower=lambda: tower, get_model=lambda: inner)
    builder = module_from(tmp_path, monkeypatch, "fake.model.builder", LOADER)
    builder.make = lambda: model
    patches = mended("tower_half", builder)
    builder.load_pretrained_model("x", None, "llava", device_map="cpu")
    assert tower.dtype == torch.bfloat16 and tower.device.type == "cpu"  # with the projector, wherever that is
    assert tower.to(torch.float32).dtype == torch.float32 and "to" not in vars(HEVCViTPackingVisionTower)
    patches.undo()
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            builder.load_pretrained_model("x", None, "llava", device_map="cpu")
    sound = module_from(tmp_path, monkeypatch, "fake.model.other", "def load_pretrained_model(model_path): pass")
    assert mended("tower_half", sound) is None


# ---------------------------------------------------------------- DeepSpeed

ENGINE = """
import torch
class DeepSpeedEngine:
    def _cast_module_mixed_precision(self, param_dtype, buffer_dtype, is_zero_init_model, keep_pattern=None):
        if param_dtype is not None and {condition}:
            for parameter in self.module.parameters():
                parameter.data = parameter.data.to(param_dtype)
"""


def test_zero3_cast(tmp_path, monkeypatch):
    fake = module_from(tmp_path, monkeypatch, "fake_deepspeed", ENGINE.format(condition="not is_zero_init_model"))
    engine = fake.DeepSpeedEngine()
    engine.module = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    engine.module[0].weight.ds_id = 1
    patches = mended("zero3_cast", fake)
    engine._cast_module_mixed_precision(None, None, True)
    assert [p.dtype for p in engine.module.parameters()] == [torch.float32] * 2
    engine._cast_module_mixed_precision(torch.bfloat16, None, True)
    assert [p.dtype for p in engine.module.parameters()] == [torch.float32, torch.bfloat16]
    patches.undo()
    assert mended("zero3_cast", module_from(tmp_path, monkeypatch, "other", ENGINE.format(condition="True"))) is None
    older = ModuleType("older")
    older.DeepSpeedEngine = object
    assert mended("zero3_cast", older) is None


# ---------------------------------------------------------------- what is left alone


def test_a_defect_that_is_left_is_known(tmp_path, monkeypatch):
    from llava_packing_tower.hosts.imports import ImportHooks

    monkeypatch.setattr(mends, "MENDS", {})
    monkeypatch.setattr(mends, "MEND_MODULES", ())
    monkeypatch.setattr(mends, "_applied", {})
    monkeypatch.setattr(mends, "_left", {})
    for name, sick in (("one", True), ("two", False)):
        function = lambda module, patches: pytest.fail("applied")  # noqa: E731
        function.__name__ = name
        mends.mend(module="left_host.part", reason="x", defect=lambda module, sick=sick: sick)(function)
    monkeypatch.setenv(mends.DISABLE_ENV, "one,two")
    hooks, patches = ImportHooks(), Patches()
    mends.install("left_host", hooks, patches)
    monkeypatch.setitem(sys.modules, "left_host.part", ModuleType("left_host.part"))
    sys.modules["left_host.part"].__spec__ = None
    for callback in hooks._after["left_host.part"]:
        callback(sys.modules["left_host.part"])
    assert mends.left() == ("one",) and mends.applied() == ()
    patches.undo()
    assert mends.left() == ()
