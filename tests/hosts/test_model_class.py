"""The class of a checkpoint is what its config says, in the host's own loader and in ours; a wrong one is refused."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import warm
from host_runs import HOSTS, environment

from llava_packing_tower.eval.preflight import check_checkpoint
from llava_packing_tower.integrations.llava import model_class
from llava_packing_tower.integrations.llava.host import FoundHost
from llava_packing_tower.integrations.llava.hosts.llava_v1 import HOST
from llava_packing_tower.utils.files import write_json

needs_llava = pytest.mark.skipif(find_spec("llava") is None, reason="no LLaVA is installed")
HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architectures": ["LlavaQwenForCausalLM"], "model_type": "qwen2"}, "LlavaQwenForCausalLM"),
        ({"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_llama"}, "LlavaQwenForCausalLM"),
        # A LoRA's config is the decoder's.
        (
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "mm_vision_tower": "x"},
            "LlavaQwenForCausalLM",
        ),
        ({"architectures": ["Qwen2MoeForCausalLM"], "mm_vision_tower": "x"}, "LlavaQwenMoeForCausalLM"),
        ({"model_type": "llava_mistral"}, "LlavaMistralForCausalLM"),
        ({"model_type": "llava", "mm_vision_tower": "x"}, "LlavaLlamaForCausalLM"),
        ({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}, None),  # transformers' own
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, None),
        ({}, None),
    ],
)
def test_what_a_config_says(config, name):
    assert model_class.class_name(config, HOST) == name


def test_a_plain_decoder_is_what_llava_makes_of_it():
    assert model_class.class_name({"architectures": ["Qwen2ForCausalLM"]}, HOST, plain=True) == "LlavaQwenForCausalLM"
    assert HOST.loader_name("LlavaQwenMoeForCausalLM") == "llava_qwen_moe"


def test_the_hosts_scripts_get_a_name_that_says_what_it_is(tmp_path):
    named = model_class.name_by_architectures(lambda path: path.rstrip("/").split("/")[-1], HOST)
    write_json({"architectures": ["LlavaQwenForCausalLM"], "mm_packing_conversation": "v1"}, tmp_path / "config.json")
    assert named(str(tmp_path)) == f"llava_qwen_v1_{tmp_path.name}"
    assert named("/gone/run1") == "run1" and named("/gone/llava-x") == "llava-x"


@needs_llava
def test_an_evaluation_asks_first_whether_the_host_has_the_class(tmp_path, monkeypatch):
    from llava_packing_tower.eval import preflight

    host = tmp_path / "host"
    (host / "model" / "language_model").mkdir(parents=True)
    monkeypatch.setattr(preflight, "find_host", lambda: FoundHost(HOST, host, "1"))
    write_json({"architectures": ["LlavaQwenForCausalLM"], "mm_vision_tower": "packing:x"}, tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"is a LlavaQwenForCausalLM, a class that the LLaVA in .* does not have"):
        check_checkpoint(tmp_path, None)
    (host / "model" / "language_model" / "some_file.py").write_text("class LlavaQwenForCausalLM(X): pass")
    check_checkpoint(tmp_path, None)


@needs_llava
@pytest.mark.timeout(900)
@pytest.mark.parametrize("next_dir", HOSTS)
def test_every_decoder_loads_from_any_folder_or_is_refused(tmp_path, next_dir):
    env = {**environment(next_dir), "PYTHONPATH": f"{HELPERS.parents[1]}"}
    result = warm.execute([sys.executable, str(HELPERS / "model_class_checks.py"), str(tmp_path)], env)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
    assert result.stdout.count("checked") == (2 if next_dir else 3)
