"""LLaVAction, a fork that keeps LLaVA-NeXT's layout under a package name of its own.

For its models: loading, `generate`, training steps of one's own. Its train.py wants the files of EPIC-Kitchens, so the
launcher does not start it.
"""

from __future__ import annotations

from pathlib import Path

from ..host import Host


def recognises(root: Path) -> bool:
    return (root / "model" / "llava_arch.py").is_file() and (root / "action").is_dir()


HOST = Host(
    name="llavaction",
    title="LLaVAction",
    package="llavaction",
    recognises=recognises,
    install="pip install --no-deps llavaction==0.0.1",
)
