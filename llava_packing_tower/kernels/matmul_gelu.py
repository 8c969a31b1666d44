"""A matmul with a bias and a GELU in one kernel: the one function of torch without a public name that is called here.

``torch._addmm_activation`` is cuBLASLt's epilogue. The public way, ``F.linear`` and an activation, reads and writes the
largest tensor of the block once more: about a tenth of a forward of 64 images on an H100.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

KNOWN = ((2, 1), (2, 13))
"""The torch versions with which ``_addmm_activation`` was tested (first and last); others take the public way."""


def _has_epilogue() -> bool:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return KNOWN[0] <= version <= KNOWN[1] and hasattr(torch, "_addmm_activation")


HAS_EPILOGUE = _has_epilogue()


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``gelu(x @ weight.t() + bias, approximate="tanh")``.

    Args:
        x: ``[N, hidden]``, float16 or bfloat16 on a GPU. weight: ``[wide, hidden]``. bias: ``[wide]``.
    """
    if HAS_EPILOGUE:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
