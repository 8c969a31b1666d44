"""Compat patches of the decoder's attention: torch's own, and the one that the loader asks for."""

from __future__ import annotations

import inspect
import logging
import os
from types import ModuleType

from ..methods import Call, add_step
from ..patcher import Patches
from ..registry import loader
from . import compat_patch

logger = logging.getLogger(__name__)

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


@compat_patch(
    module="{arch}",
    reason="on Hopper and Blackwell, scaled_dot_product_attention tries cuDNN first, which builds a plan for every new "
    "shape: one for each token of an answer and for each length of a batch",
    issue="modelscope/FunASR#3704",
    defect=_asks_cudnn_first,
)
def cudnn_plans(_: ModuleType, patches: Patches) -> None:
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    patches.on_undo(lambda: torch.backends.cuda.enable_cudnn_sdp(True))


# ---------------------------------------------------------------- the loader


def _loader_asks_for_flash(builder: ModuleType) -> bool:
    asked = inspect.signature(loader(builder)).parameters.get("attn_implementation")
    return asked is not None and asked.default == "flash_attention_2"


@compat_patch(
    module="{loader}",
    reason="the loader asks for flash_attention_2 unless its caller names another backend, which no script of the host "
    "does; where flash-attn or CUDA is missing, sdpa is used instead",
    defect=_loader_asks_for_flash,
)
def loader_attention(builder: ModuleType, patches: Patches) -> None:
    def without_flash(call: Call) -> None:
        # Asked now, not when the patch is applied: to look for a GPU starts CUDA.
        from transformers.utils import is_flash_attn_2_available

        if "attn_implementation" not in call.arguments and not is_flash_attn_2_available():
            logger.warning("flash-attn cannot be used here: the decoder is loaded with sdpa attention")
            call.arguments["attn_implementation"] = "sdpa"

    add_step(
        builder, "builder.load_pretrained_model", "loader_attention", without_flash, patches, loader(builder).__name__
    )
