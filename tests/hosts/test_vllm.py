"""Exports in vLLM, by hand: VLLM_PYTHON names the interpreter of an environment with vLLM and this package.

HF_PYTHON, with colons between them, names those of environments with transformers alone.

Result of 2026-11-30: docs/export.md.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from host_runs import NEXT, environment, execute

INTERPRETER = os.environ.get("VLLM_PYTHON", "")
HELPERS = Path(__file__).parents[1] / "helpers"
# vLLM has attention for heads of these widths only; tiny decoders have others.
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
NEXT_CASES = [("siglip2", "anyres", "Qwen", {})] if NEXT else []
CASES = [
    ("llava_vit", "native", "Llama", {"mm_packing_video": "clip", "mm_newline_position": "grid"}),
    ("dinov3", "anyres", "Llama", {}),
    ("aimv2", "pad", "Mistral", {"mm_projector_type": "spatial_merge"}),
    ("qwen3_vl", "native", "Llama", {"mm_packing_video": "clip", "mm_projector_type": "spatial_merge"}),
    *NEXT_CASES,
]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not INTERPRETER, reason="VLLM_PYTHON is not set"),
    pytest.mark.skipif(find_spec("llava") is None, reason="no LLaVA is installed"),
]


@pytest.mark.timeout(1200)
def test_vllm_answers_as_llava_does(tmp_path):
    """Greedy ids in float32: over HTTP with images of several shapes at once, and in process with videos."""
    import export_checks as checks

    from llava_packing_tower.export.writer import export

    for number, (family, ratio, decoder, more) in enumerate(CASES):
        checkpoint = checks.make_checkpoint(tmp_path, family, ratio, decoder, sizes=SIZES, **more)
        export(checkpoint, tmp_path / f"case_{number}")
        checks.save_says(tmp_path / f"case_{number}.npz", checks.says_all(checkpoint))
    env = {**environment(""), "VLLM_CPU_KVCACHE_SPACE": "1"}
    result = execute([INTERPRETER, str(HELPERS / "vllm_checks.py"), str(tmp_path)], env, timeout=1000)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert result.stdout.count("served case_") == 1 and result.stdout.count("answered case_") == len(CASES)


@pytest.mark.timeout(1200)
def test_the_demos_photographs(demo, tmp_path):
    """The demo's checkpoint answers as in LLaVA: served by vLLM, all photographs at once, and in each transformers."""
    from llava_packing_tower.export.writer import export

    export(demo.trained, tmp_path / "demo")
    expected = json.loads((demo.output / "answers_after.json").read_text(encoding="utf-8"))["answers"]
    others = [path for path in os.environ.get("HF_PYTHON", "").split(":") if path]
    env = {**environment(""), "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(HELPERS.parents[1])}
    for interpreter, word in [(INTERPRETER, "serve"), *((path, "ask") for path in (INTERPRETER, *others))]:
        places = [str(path) for path in (tmp_path / "demo", demo.data, demo.images)]
        result = execute([interpreter, str(HELPERS / "vllm_checks.py"), word, *places], env, timeout=500)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
        assert json.loads(result.stdout.splitlines()[-1]) == expected and len(expected) == 16, interpreter
