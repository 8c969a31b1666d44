"""Compat patches: applied only where the defect is, logged once, switched off by name, undone; and the engine check."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from compat_modules import module_from, patched, stand_in_host
from conftest import only_four
from torch import nn

from llava_packing_tower.integrations.llava import compat, trainable_parts
from llava_packing_tower.integrations.llava.compat import deepspeed as ds_mends
from llava_packing_tower.integrations.llava.compat import llava, torch_load
from llava_packing_tower.integrations.llava.patcher import Patches
from llava_packing_tower.train import callbacks
from llava_packing_tower.utils.import_hooks import ImportHooks

# ---------------------------------------------------------------- the machinery


@pytest.fixture
def one_patch(tmp_path, monkeypatch):
    """A package ``sickhost`` with a defect in one of its modules, and one patch that knows it."""
    (tmp_path / "sickhost").mkdir()
    (tmp_path / "sickhost" / "__init__.py").write_text("")
    (tmp_path / "sickhost" / "part.py").write_text("VALUE = 'sick'")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(compat, "COMPAT_PATCHES", {})
    monkeypatch.setattr(compat, "PATCH_MODULES", ())
    monkeypatch.setattr(compat, "_applied", {})

    @compat.compat_patch(
        module="{package}.part", reason="it is sick", issue="a/b#1", defect=lambda part: part.VALUE == "sick"
    )
    def cure(part, patches):
        patches.set(part, "VALUE", "well")

    hooks, patches = ImportHooks(), Patches()
    hooks.install()
    yield SimpleNamespace(hooks=hooks, patches=patches, file=tmp_path / "sickhost" / "part.py")
    hooks.remove()
    for name in [m for m in sys.modules if m.split(".")[0] == "sickhost"]:
        del sys.modules[name]


def test_applied_once_logged_once_and_undone(one_patch, caplog):
    caplog.set_level(logging.INFO, "llava_packing_tower")
    compat.install(stand_in_host("sickhost"), one_patch.hooks, one_patch.patches)
    assert compat.applied() == ()
    part = importlib.import_module("sickhost.part")
    assert part.VALUE == "well" and compat.applied() == ("cure",)
    importlib.reload(part)
    assert part.VALUE == "well"
    assert [r.getMessage() for r in caplog.records] == ["compat patch cure: it is sick (a/b#1)"]
    one_patch.hooks.remove()
    one_patch.patches.undo()
    assert part.VALUE == "sick" and compat.applied() == ()


def test_a_module_that_is_imported_already_is_mended_at_once(one_patch):
    part = importlib.import_module("sickhost.part")
    compat.install(stand_in_host("sickhost"), one_patch.hooks, one_patch.patches)
    assert part.VALUE == "well"


def test_nothing_is_done_where_there_is_no_defect(one_patch, caplog):
    caplog.set_level(logging.INFO, "llava_packing_tower")
    one_patch.file.write_text("VALUE = 'healthy'")
    compat.install(stand_in_host("sickhost"), one_patch.hooks, one_patch.patches)
    assert importlib.import_module("sickhost.part").VALUE == "healthy"
    assert compat.applied() == () and not caplog.records


def test_switched_off_by_name(one_patch, monkeypatch):
    monkeypatch.setenv(compat.DISABLE_ENV, " cure ,")
    compat.install(stand_in_host("sickhost"), one_patch.hooks, one_patch.patches)
    assert importlib.import_module("sickhost.part").VALUE == "sick" and compat.applied() == ()


def test_a_name_that_no_patch_has_is_an_error(one_patch, monkeypatch):
    monkeypatch.setenv(compat.DISABLE_ENV, "cur")
    with pytest.raises(ValueError, match="'cur', which is not a compat patch; the nearest is 'cure'"):
        compat.install(stand_in_host("sickhost"), one_patch.hooks, one_patch.patches)


def test_every_patch_says_what_and_why():
    for name, item in compat.load_all().items():
        assert name.isidentifier() and len(item.reason) > 30
        assert item.issue is None or "#" in item.issue


# ---------------------------------------------------------------- the single patches

SAVE = """
import torch
def safe_save_model_for_hf_trainer(trainer, output_dir):
    torch.cuda.synchronize()
    return output_dir
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_sync(tmp_path, monkeypatch):
    train = module_from(tmp_path, monkeypatch, "fake.train.train", SAVE)
    synchronize = torch.cuda.synchronize
    with pytest.raises((AssertionError, RuntimeError)):
        train.safe_save_model_for_hf_trainer(None, "x")
    patches = patched("cuda_sync", train)
    assert train.safe_save_model_for_hf_trainer(None, "x") == "x"
    assert torch.cuda.synchronize is synchronize  # for the time of the save only
    patches.undo()
    with pytest.raises((AssertionError, RuntimeError)):
        train.safe_save_model_for_hf_trainer(None, "x")
    healthy = module_from(tmp_path, monkeypatch, "fake.train.other", SAVE.replace("torch.cuda.synchronize()", "pass"))
    assert patched("cuda_sync", healthy) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert patched("cuda_sync", train) is None


MODEL = """
from transformers import LlamaForCausalLM
class Model(LlamaForCausalLM):
    def forward(self, input_ids=None, images=None{more}):
        return input_ids, images
"""


@only_four
def test_fwd_kw(tmp_path, monkeypatch):
    model = module_from(tmp_path, monkeypatch, "fake.model", MODEL.format(more=""))
    signature = inspect.signature(model.Model.forward)
    assert patched("fwd_kw", model) is not None
    assert model.Model.forward(None, 1, images=2, cache_position=3) == (1, 2)
    assert inspect.signature(model.Model.forward) == signature  # generate() and the Trainer look at it
    for number, more in enumerate((", cache_position=None", ", **kwargs")):
        assert (
            patched("fwd_kw", module_from(tmp_path, monkeypatch, f"fake.model{number}", MODEL.format(more=more)))
            is None
        )


TRAINER = """
class LLaVATrainer:
    def _inner_training_loop(self):
        return {loop}
    def train(self):
        return "trained"
    def create_optimizer(self):
        optimizer_grouped_parameters = self.groups
        return self.optimizer(optimizer_grouped_parameters)
"""


def test_inner_loop(tmp_path, monkeypatch):
    broken = module_from(
        tmp_path, monkeypatch, "fake.train.llava_trainer", TRAINER.format(loop="DebugOption.UNDERFLOW")
    )
    patches = patched("inner_loop", broken)
    assert "_inner_training_loop" not in vars(broken.LLaVATrainer)
    trainer = broken.LLaVATrainer()
    for mode, trains in (("regular", True), ("zo", False)):  # of zo no step would change a weight
        trainer.args = SimpleNamespace(trainer_mode=mode)
        said = pytest.raises(ValueError, match=r"^trainer_mode zo needs the training loop of fake\.train")
        with nullcontext() if trains else said:
            assert trainer.train() == "trained"
    patches.undo()
    assert "_inner_training_loop" in vars(broken.LLaVATrainer)
    sound = module_from(tmp_path, monkeypatch, "fake.train.other", TRAINER.format(loop="len([self])"))
    assert patched("inner_loop", sound) is None
    assert llava._undefined_globals(broken.LLaVATrainer._inner_training_loop, broken) == {"DebugOption"}


@pytest.mark.newest
@pytest.mark.skipif(torch.cuda.is_available(), reason="it is for machines without a GPU")
def test_cpu_number(tmp_path, monkeypatch):
    """What the trainer's processes on a CPU load their optimizer to."""
    monkeypatch.setattr(torch_load, "_known", set())  # a LLaVA may have been hooked in this process
    torch.save({"moments": torch.arange(3.0)}, tmp_path / "optimizer.pt")
    load = functools.partial(torch.load, tmp_path / "optimizer.pt", map_location=torch.device("cpu", 0))
    for _ in range(2):  # and again after it was taken back
        patches = patched("cpu_number", None)
        assert load()["moments"].tolist() == [0.0, 1.0, 2.0] and load()["moments"].device.type == "cpu"
        patches.undo()
        with pytest.raises(RuntimeError, match="cpu:0"):
            load()


def test_empty_groups(tmp_path, monkeypatch):
    module = module_from(tmp_path, monkeypatch, "fake.train.llava_trainer", TRAINER.format(loop="1"))
    weight = nn.Parameter(torch.ones(2))
    trainer = module.LLaVATrainer()
    trainer.optimizer = torch.optim.AdamW
    trainer.groups = [{"params": [weight], "lr": 1.0}, {"params": [], "lr": 2.0}]
    assert patched("empty_groups", module) is not None
    groups = trainer.create_optimizer().param_groups
    assert [g["lr"] for g in groups] == [1.0] and groups[0]["params"][0] is weight


TRAIN = """
import torch
def train(training_args, vision_tower):
    vision_tower.to(dtype=torch.bfloat16 if training_args.bf16 else torch.float16, device="cpu")
"""
ARCH = """
class LlavaMetaModel:
    def initialize_vision_modules(self, model_args, fsdp=None):
        self.tower = model_args.tower
    def get_vision_tower(self):
        return self.tower
"""


@pytest.mark.parametrize(
    ("bf16", "fp16", "expected"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.float16)],
)
def test_tower_fp32(tmp_path, monkeypatch, bf16, fp16, expected):
    arch = module_from(tmp_path, monkeypatch, "fake.model.llava_arch", ARCH)
    train = module_from(tmp_path, monkeypatch, "fake.train.train", TRAIN)
    arguments = SimpleNamespace(bf16=bf16, fp16=fp16)
    monkeypatch.setattr(llava, "current_training_arguments", lambda: arguments)
    assert patched("tower_fp32", train) is not None
    tower, model = nn.Linear(2, 2), arch.LlavaMetaModel()
    model.initialize_vision_modules(SimpleNamespace(tower=tower))
    train.train(arguments, tower)
    assert tower.weight.dtype is expected
    assert tower.to(torch.float16).weight.dtype is torch.float16  # it was for that one call


def test_ds_agsync_and_shm_op():
    deepspeed = pytest.importorskip("deepspeed")
    if torch.cuda.is_available():
        assert patched("ds_agsync", deepspeed) is None and patched("ds_shm_op", deepspeed) is None
        return
    gather, build = deepspeed.comm.all_gather_into_tensor, ds_mends._backend_globals()["build_shm_op"]
    waits = []
    handle = SimpleNamespace(wait=lambda: waits.append(1))
    if (patches := patched("ds_agsync", deepspeed)) is not None:  # the DeepSpeed here may not have the defect
        wrapped = deepspeed.comm.all_gather_into_tensor
        assert wrapped(_gather=lambda: handle) is handle and waits == [1]
        assert wrapped(_gather=lambda: None) is None
        patches.undo()
    if (patches := patched("ds_shm_op", deepspeed)) is not None:
        assert ds_mends._backend_globals()["build_shm_op"]() is None
        patches.undo()
    assert deepspeed.comm.all_gather_into_tensor is gather and ds_mends._backend_globals()["build_shm_op"] is build


def test_ds_gradient_types():
    pytest.importorskip("deepspeed")
    import deepspeed
    from deepspeed.runtime.zero import stage_1_and_2

    before = stage_1_and_2.split_half_float_double
    gradients = [torch.ones(2), torch.ones(3, dtype=torch.bfloat16), torch.ones(4)]
    patches = patched("ds_gradient_types", deepspeed)
    assert [len(bucket) for bucket in stage_1_and_2.split_half_float_double(gradients)] == [2, 1]
    if patches is not None:
        patches.undo()
        assert stage_1_and_2.split_half_float_double is before and before(gradients) == []


@pytest.mark.newest
@pytest.mark.parametrize("bad", [None, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_overflow_check(bad, dtype, monkeypatch):
    deepspeed = pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Optimizer

    before, largest = Optimizer.has_overflow_partitioned_grads_serial, torch.finfo(dtype).max
    patches = patched("overflow_check", deepspeed)
    assert patches is not None and Optimizer.has_overflow_partitioned_grads_serial is not before
    gradients = {
        0: [torch.tensor([[largest, -largest], [1, -2]], dtype=dtype), None],
        1: [],
        2: [torch.ones(0), torch.ones(3)],
    }
    fake = SimpleNamespace(
        bit16_groups=[[]] * 3, averaged_gradients=gradients, _has_inf_or_nan=Optimizer._has_inf_or_nan
    )
    if bad is not None:
        gradients[2][1][1] = bad
    found = Optimizer.has_overflow_partitioned_grads_serial(fake)
    # DeepSpeed 0.14 takes the largest of the values of each, of which an empty one has none.
    gradients[2] = gradients[2][1:]
    assert torch.equal(found, before(fake)) and found.tolist() == [bad is not None]
    gradients[1].append(torch.ones(2, 2).to_sparse())
    seen = []
    monkeypatch.setattr(fake, "_has_inf_or_nan", lambda gradient: seen.append(gradient) or torch.tensor(0.0))
    Optimizer.has_overflow_partitioned_grads_serial(fake)
    assert len(seen) == 3  # sparse gradients are left to DeepSpeed
    gradients.update({0: [], 1: [None], 2: []})  # a rank whose partition has no trained weight
    assert Optimizer.has_overflow_partitioned_grads_serial(fake).tolist() == [False]
    patches.undo()
    assert Optimizer.has_overflow_partitioned_grads_serial is before


# ---------------------------------------------------------------- what is trained


class Parts(nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)
        for name in ("vision_tower", "mm_projector", "vision_resampler", "layers", "lora_layers"):
            setattr(self, name, nn.Linear(2, 1, bias=False))
            getattr(self, name).weight.requires_grad_(name == "layers")


@pytest.mark.parametrize(
    ("config", "lora", "trained"),
    [
        ({"mm_tunable_parts": "mm_vision_tower, mm_mlp_adapter"}, False, {"vision_tower", "mm_projector"}),
        ({"mm_tunable_parts": "mm_language_model"}, False, {"layers", "lora_layers"}),
        ({"mm_tunable_parts": "mm_vision_tower,mm_language_model"}, True, {"vision_tower", "lora_layers"}),
        ({"mm_tunable_parts": None, "unfreeze_mm_vision_tower": True}, False, {"layers", "vision_tower"}),
        ({"mm_tunable_parts": None}, False, {"layers"}),
    ],
)
def test_set_trainable(config, lora, trained):
    model = Parts(**config)
    trainable_parts.set_trainable(model, lora)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == trained


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match=r"'mm_tower'.*mm_vision_tower, mm_mlp_adapter"):
        trainable_parts.tunable_parts("mm_tower")


def test_the_tower_gets_its_own_learning_rate():
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = torch.optim.AdamW(
        [{"params": [a, b], "weight_decay": 0.1}, {"params": [c], "weight_decay": 0.0}], lr=1.0
    )
    trainable_parts.split_groups(optimizer, {id(b), id(c)}, 0.25)
    groups = [([id(p) for p in g["params"]], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [([id(a)], 1.0, 0.1), ([id(b)], 0.25, 0.1), ([id(c)], 0.25, 0.0)]


# ---------------------------------------------------------------- the engine


def test_asked_stage(tmp_path):
    (tmp_path / "z.json").write_text('{"zero_optimization": {"stage": 3}}')
    assert callbacks.asked_stage(str(tmp_path / "z.json")) == 3
    assert callbacks.asked_stage({"zero_optimization": {"stage": 2}}) == 2
    assert callbacks.asked_stage({"bf16": {}}) == 0
    assert callbacks.asked_stage(None) is None


def test_plain_ddp_is_refused(tmp_path):
    pytest.importorskip("deepspeed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        with pytest.raises(
            RuntimeError, match="ZeRO-2 was requested, but the model is wrapped in DistributedDataParallel"
        ):
            callbacks.check_engine(wrapped, 2)
        with pytest.raises(RuntimeError, match="FSDP was requested, but the model is wrapped in DistributedDataPara"):
            callbacks.check_engine(wrapped, None, fsdp=True)
        line = callbacks.check_engine(wrapped, None)
        assert line == "engine: DistributedDataParallel, world size 1, backend gloo"
    finally:
        torch.distributed.destroy_process_group()


def test_another_stage_is_refused():
    deepspeed = pytest.importorskip("deepspeed")

    class Engine(deepspeed.DeepSpeedEngine):
        def __init__(self, stage):
            nn.Module.__init__(self)
            self.stage = stage

        def zero_optimization_stage(self):
            return self.stage

        def __getattr__(self, name):
            return nn.Module.__getattr__(self, name)

        def __del__(self):
            pass

    with pytest.raises(RuntimeError, match="ZeRO-3 was requested, but the engine runs stage 2"):
        callbacks.check_engine(Engine(2), 3)
    assert callbacks.check_engine(Engine(3), 3).startswith("engine: Engine, ZeRO stage 3, world size 1")


def test_small_buckets_are_named():
    def engine(stage, size):
        return SimpleNamespace(zero_optimization_stage=lambda: stage, zero_reduce_bucket_size=lambda: size)

    assert callbacks.small_buckets(nn.Linear(1, 1)) == callbacks.small_buckets(engine(0, 802_816)) == []
    assert callbacks.small_buckets(engine(3, 200_000_000)) == []
    (line,) = callbacks.small_buckets(engine(2, 802_816))
    assert line.startswith("note: reduce_bucket_size is 802,816 elements")


def test_progress_says_step_loss_and_time_left(capsys, monkeypatch):
    now = iter([100.0, 110.0, 111.0, 123.5])
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(now))
    progress, state = callbacks.Progress(), SimpleNamespace(global_step=0, max_steps=10, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    state.global_step = 2
    progress.on_log(None, state, None, {"loss": 1.25, "learning_rate": 1e-3})
    state.global_step = 3
    quiet = SimpleNamespace(should_log=False)
    progress.on_step_end(None, state, quiet)  # one second later: nothing to say yet
    progress.on_log(None, state, None, {"train_runtime": 1.0})
    assert capsys.readouterr().out == "step  2/10  loss 1.2500  lr 1.0e-03  0:40 left\n"
