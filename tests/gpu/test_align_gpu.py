"""The families against transformers' own models on a GPU, at the published sizes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from llava_packing_tower.attention.dispatch import backend_module

REPOSITORY = Path(__file__).parent.parent.parent
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(not hasattr(transformers, "DINOv3ViTModel"), reason="this transformers lacks the families"),
]


@pytest.mark.parametrize("attention", ["flash_attention_2", "auto"])
@pytest.mark.parametrize("size", ["siglip2_so400m", "aimv2_large_native", "dinov3_vitl16"])
def test_bfloat16_error_at_most_twice_transformers_own(size, attention):
    if attention != "auto" and (
        reason := backend_module(attention).unsupported_reason(torch.device("cuda"), torch.bfloat16, 64)
    ):
        pytest.skip(f"{attention}: {reason}")
    words = ["benchmarks/align_published_sizes.py", "--sizes", size, "--attention", attention]
    result = subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0 and "ALL TESTS PASSED" in result.stdout, result.stdout + result.stderr
