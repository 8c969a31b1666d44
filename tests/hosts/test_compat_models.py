"""Compat patches of the hosts' models, tokenisation and loader, and of DeepSpeed, for newer libraries."""

from __future__ import annotations

import functools
import json
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from compat_modules import module_from, patched
from conftest import FIVE, only_five, only_four
from torch.torch_version import TorchVersion
from transformers import PretrainedConfig

from llava_packing_tower.towers.packing_tower import HEVCViTPackingVisionTower

pytestmark = pytest.mark.newest


# ---------------------------------------------------------------- models, tokenisation, loader


@only_five
def test_rope_scaling_none(tmp_path, monkeypatch):
    from transformers import PretrainedConfig, Qwen2Config

    def host(line: str) -> ModuleType:
        (tmp_path / "fake" / "model" / "language_model").mkdir(parents=True, exist_ok=True)
        (tmp_path / "fake" / "model" / "language_model" / "llava_x.py").write_text(line)
        return module_from(tmp_path, monkeypatch, "fake.model.__init__", "")

    assert patched("rope_scaling_none", host("# nothing")) is None
    before = vars(PretrainedConfig)[
        "rope_scaling"
    ]  # (patched already, where a test has hooked a LLaVA in this process)
    patches = patched("rope_scaling_none", host("config.rope_scaling = None"))
    config = Qwen2Config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 12345.0})
    config.rope_scaling = None
    assert config.rope_parameters == {"rope_theta": 12345.0, "rope_type": "default"}
    config.rope_scaling = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1.0}
    assert config.rope_parameters["factor"] == 3.0
    patches.undo()
    assert vars(PretrainedConfig)["rope_scaling"] is before


@only_four
def test_rope_scaling_none_is_no_defect_of_transformers_4(tmp_path, monkeypatch):
    (tmp_path / "fake" / "model" / "language_model").mkdir(parents=True)
    (tmp_path / "fake" / "model" / "language_model" / "llava_x.py").write_text("config.rope_scaling = None")
    assert not isinstance(vars(PretrainedConfig).get("rope_scaling"), property)
    assert patched("rope_scaling_none", module_from(tmp_path, monkeypatch, "fake.model.__init__", "")) is None


MODELS = """
from transformers import Qwen2Config, Qwen2ForCausalLM
class LlavaForCausalLM(Qwen2ForCausalLM):
    pass
def tiny():
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1)
    return LlavaForCausalLM(Qwen2Config(vocab_size=11, num_hidden_layers=1, **sizes))
"""


def test_dtype_none(tmp_path, monkeypatch):
    models = module_from(tmp_path, monkeypatch, "fake.model.__init__", MODELS)
    models.tiny().to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    load = functools.partial(models.LlavaForCausalLM.from_pretrained, tmp_path / "bf16")
    before, four = load().dtype, load(torch_dtype=None).dtype is torch.float32
    patches = patched("dtype_none", models)
    assert (patches is None) is four  # there is nothing to mend in transformers 4
    load = functools.partial(models.LlavaForCausalLM.from_pretrained, tmp_path / "bf16")
    assert load(torch_dtype=None).dtype is torch.float32 and load().dtype is before
    assert load(torch_dtype=torch.bfloat16).dtype is load(torch_dtype="auto").dtype is torch.bfloat16
    if patches is not None:
        assert load(dtype=torch.float16, torch_dtype=None).dtype is torch.float16
        patches.undo()
        assert "from_pretrained" not in vars(models.LlavaForCausalLM)


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
    """The same function gives on transformers 5, patched, what it gives on transformers 4 as it is."""
    pytest.importorskip("jinja2")
    train = module_from(tmp_path, monkeypatch, "fake.train.train", PREPROCESS)
    kind = type(tokenizer)
    patches = patched("chat_template_ids", train)
    assert (patches is not None) == FIVE
    ids, ends, image = train.preprocess_qwen(["a <image> b", "b"], tokenizer)
    assert (ids, ends, image) == ([3, 1, 5, 2, 4, 3, 2, 4], (3, 4), 5)
    assert type(tokenizer) is kind and not hasattr(kind, "_made")  # the caller's own is as it was
    if FIVE:
        patches.undo()
        with pytest.raises(AttributeError):
            train.preprocess_qwen(["a"], tokenizer)


@only_five
def test_additional_tokens_of_a_tokenizer_that_transformers_4_saved(tmp_path, monkeypatch):
    """From 4.47 to 4.57 it is saved with an empty "extra_special_tokens" beside them, which is all that 5.17 reads."""
    pytest.importorskip("jinja2")
    made = transformers.Qwen2Tokenizer(vocab={"?": 0, "a": 1, "b": 2}, merges=[], unk_token="?", pad_token="?")
    made.add_special_tokens({"extra_special_tokens": ["<s>", "</s>"]})
    made.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    content = {**json.loads(file.read_text()), "extra_special_tokens": {}}
    file.write_text(json.dumps(content | {"additional_special_tokens": ["<s>", "</s>"]}))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again.extra_special_tokens = []  # 5.23 reads both
    train = module_from(tmp_path, monkeypatch, "fake.train.train", PREPROCESS)
    patched("chat_template_ids", train)
    assert train.preprocess_qwen(["a"], again)[1] == tuple(again.convert_tokens_to_ids(["<s>", "</s>"]))


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
    patches = patched("tower_half", builder)
    builder.load_pretrained_model("x", None, "llava", device_map="cpu")
    assert tower.dtype == torch.bfloat16 and tower.device.type == "cpu"  # with the projector, wherever that is
    assert tower.to(torch.float32).dtype == torch.float32 and "to" not in vars(HEVCViTPackingVisionTower)
    patches.undo()
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            builder.load_pretrained_model("x", None, "llava", device_map="cpu")
    sound = module_from(tmp_path, monkeypatch, "fake.model.other", "def load_pretrained_model(model_path): pass")
    assert patched("tower_half", sound) is None


FLASH_LOADER = """
def load_pretrained_model(model_path, model_base, attn_implementation="flash_attention_2", **kwargs):
    return attn_implementation
"""


@pytest.mark.newest
@pytest.mark.parametrize("there", [False, True])
def test_loader_attention(tmp_path, monkeypatch, caplog, there):
    builder = module_from(tmp_path, monkeypatch, "fake.model.builder", FLASH_LOADER)
    patches = patched("loader_attention", builder)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: there)
    load = builder.load_pretrained_model
    assert load("x", None, device_map="cpu") == ("flash_attention_2" if there else "sdpa")
    assert bool(caplog.records) is not there
    # What the caller names stays, by place too.
    assert load("x", None, "flash_attention_2") == load("x", None, attn_implementation="flash_attention_2")
    assert load("x", None, "eager") == "eager" and load("x", None, "flash_attention_2") == "flash_attention_2"
    patches.undo()
    assert builder.load_pretrained_model("x", None) == "flash_attention_2"
    sound = module_from(tmp_path, monkeypatch, "fake.model.other", "def load_pretrained_model(model_path): pass")
    assert patched("loader_attention", sound) is None


# ---------------------------------------------------------------- torch and DeepSpeed


@pytest.mark.parametrize(
    "torch_version, cuda, cudnn, enabled, switch, sick",
    [
        ("2.11.0+cu130", "13.0", (9, 19, 0), True, None, True),
        ("2.11.0+cu130", "13.0", (9, 19, 0), False, None, False),
        ("2.12.0+cu130", "13.0", (9, 19, 0), True, "1", False),
        ("2.11.0+cu128", "12.8", (9, 10, 2), True, None, False),
        ("2.9.1+cu130", "13.0", (9, 19, 0), True, None, False),
        ("2.11.0+rocm7", None, (3, 5, 0), True, None, False),
        ("2.13.0+cpu", None, None, True, None, False),
    ],
)
def test_cudnn_plans(monkeypatch, torch_version, cuda, cudnn, enabled, switch, sick):
    """torch 2.11 and newer ask cuDNN first; it is asked no more, and again when the hook is taken out."""

    def start():
        raise AssertionError("CUDA was started")

    monkeypatch.setattr(torch.cuda, "_lazy_init", start)
    monkeypatch.setattr(torch, "__version__", TorchVersion(torch_version))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    fake = cudnn and SimpleNamespace(getRuntimeVersion=lambda: cudnn)
    monkeypatch.setattr(torch._C, "_cudnn", fake, raising=False)
    if switch:
        monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", switch)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        patches = patched("cudnn_plans", ModuleType("llava_arch"))
        assert (patches is not None) is sick
        assert torch.backends.cuda.cudnn_sdp_enabled() is (enabled and not sick)
        if patches:
            assert patched("cudnn_plans", ModuleType("another_host")) is None
            patches.undo()
            assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


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
    patches = patched("zero3_cast", fake)
    engine._cast_module_mixed_precision(None, None, True)
    assert [p.dtype for p in engine.module.parameters()] == [torch.float32] * 2
    engine._cast_module_mixed_precision(torch.bfloat16, None, True)
    assert [p.dtype for p in engine.module.parameters()] == [torch.float32, torch.bfloat16]
    patches.undo()
    assert patched("zero3_cast", module_from(tmp_path, monkeypatch, "other", ENGINE.format(condition="True"))) is None
    older = ModuleType("older")
    older.DeepSpeedEngine = object
    assert patched("zero3_cast", older) is None
