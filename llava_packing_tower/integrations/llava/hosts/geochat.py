"""GeoChat: LLaVA 1.5 for remote sensing, under names of its own. Its models compute their loss themselves."""

from __future__ import annotations

from ..host import Host, Part

HOST = Host(
    name="geochat",
    title="GeoChat",
    package="geochat",
    install="git clone https://github.com/mbzuai-oryx/GeoChat and set LLAVA_DIR to the clone",
    arch="model.geochat_arch",
    meta_model="GeoChatMetaModel",
    mixin="GeoChatMetaForCausalLM",
    class_prefix="GeoChat",
    trainer=Part("train.geochat_trainer", "GeoChatTrainer"),
    keeps_padding=True,
    trainers=(),
)
