"""A mend of torch's attention, which the decoder uses with ``attn_implementation: sdpa``."""

from __future__ import annotations

from types import ModuleType

import torch

from ..patches import Patches
from . import mend

PREFERRED_ABOVE = 91500  # torch's own condition, check_prefer_cudnn_attention in aten's sdp_utils.cpp


def _asks_cudnn_first(cuda: ModuleType) -> bool:
    """Torch 2.11 and newer, on Hopper and Blackwell; on other GPUs cuDNN comes last anyway, so none is looked at, which
    would start CUDA."""
    if torch.version.cuda is None:
        return False
    version = torch.backends.cudnn.version()
    return version is not None and version > PREFERRED_ABOVE and getattr(cuda, "cudnn_sdp_enabled", bool)()


@mend(
    module="torch.backends.cuda",
    reason="scaled_dot_product_attention asks cuDNN first, which makes a plan for every new shape: for each token of "
    "an answer, and for each length of a batch",
    issue="modelscope/FunASR#3704",
    defect=_asks_cudnn_first,
)
def cudnn_plans(cuda: ModuleType, patches: Patches) -> None:
    cuda.enable_cudnn_sdp(False)
    patches.on_undo(lambda: cuda.enable_cudnn_sdp(True))
