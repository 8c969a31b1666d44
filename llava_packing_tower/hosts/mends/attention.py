"""A mend of torch's attention, which the decoder uses with ``attn_implementation: sdpa``."""

from __future__ import annotations

import os
from types import ModuleType

from ..patches import Patches
from . import mend

PREFERRED_ABOVE = (9, 15, 0)
"""The version of cuDNN above which torch asks it first: check_prefer_cudnn_attention in aten's sdp_utils.cpp."""


def _asks_cudnn_first(_: ModuleType) -> bool:
    """By versions: to look at a GPU would start CUDA (``torch.backends.cudnn.version()`` does), before a launcher has
    forked or said which one. On GPUs other than these two torch asks cuDNN last, and nothing is lost."""
    import torch

    cudnn = getattr(torch._C, "_cudnn", None)
    if torch.version.cuda is None or cudnn is None or torch.__version__ < (2, 10):
        return False
    if os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":  # torch's own switch
        return False
    return tuple(cudnn.getRuntimeVersion()) > PREFERRED_ABOVE and torch.backends.cuda.cudnn_sdp_enabled()


@mend(
    module="{package}.model.llava_arch",
    reason="on Hopper and Blackwell, scaled_dot_product_attention asks cuDNN first, which makes a plan for every new "
    "shape: for each token of an answer, and for each length of a batch",
    issue="modelscope/FunASR#3704",
    defect=_asks_cudnn_first,
)
def cudnn_plans(_: ModuleType, patches: Patches) -> None:
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    patches.on_undo(lambda: torch.backends.cuda.enable_cudnn_sdp(True))
