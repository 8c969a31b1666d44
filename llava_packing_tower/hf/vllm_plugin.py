"""The entry point ``vllm.general_plugins``: vLLM calls :func:`register` in each of its processes.

Importing this package has made transformers' Auto classes know exports by then.
"""

from __future__ import annotations

from . import ARCHITECTURE


def register() -> None:
    """Have vLLM serve exports by :mod:`.vllm_model`, which it imports when it loads one."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.vllm_model:LlavaPackingForVllm")
