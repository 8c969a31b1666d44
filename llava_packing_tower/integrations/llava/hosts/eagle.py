"""Eagle, the first one: several towers behind one name with semicolons, or one. Its training code is a script."""

from __future__ import annotations

from ..host import Host, Part

HOST = Host(
    name="eagle",
    title="Eagle",
    package="eagle",
    folder="Eagle",
    install="git clone https://github.com/NVlabs/Eagle and set LLAVA_DIR to the clone",
    arch="model.eagle_arch",
    meta_model="EagleMetaModel",
    mixin="EagleMetaForCausalLM",
    class_prefix="Eagle",
    trainer=Part("train.eagle_trainer", "EagleTrainer"),
    trainers=(),
)
