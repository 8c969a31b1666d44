"""Write the generated parts of the documentation: ``python docs/scripts/make_tables.py`` (``--check`` only compares).

A generated part stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. ``tests/unit/test_docs.py``
fails when one of them differs from the code.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from llava_packing_tower.attention.dispatch import BACKENDS
from llava_packing_tower.cli.main import COMMANDS
from llava_packing_tower.data.native_config import MERGE_TYPES, NEWLINES, POOL_MODES, VIDEO_MODES
from llava_packing_tower.data.smart_resize import CHECKPOINT, MERGE_NAMES, MERGES
from llava_packing_tower.integrations.llava import compat
from llava_packing_tower.integrations.llava.arguments_table import PARTS, PLUGIN_ARGUMENTS
from llava_packing_tower.integrations.llava.registry import all_hosts
from llava_packing_tower.towers.feature_select import SELECT_FEATURES
from llava_packing_tower.train.preflight import ATTENTIONS
from llava_packing_tower.utils.environment import VARIABLES

DOCS = Path(__file__).parents[1]
PART = re.compile(r"(<!-- table: (?P<name>[\w ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
DEFAULT = re.compile(r" ?\(default: (.*?)\)")

# Keys of LLaVA itself that the packing tower reads: their values, and what they mean here.
HOST_KEYS = {
    "mm_vision_tower": (
        "folder or hub id",
        "The tower. The prefix `packing:` selects the packing tower. "
        "See [Which tower a name means](training.md#which-tower-a-name-means).",
    ),
    "mm_vision_select_layer": (
        "whole number",
        "The hidden state that is returned: -1 is the output of the last block, -2 that of the block before.",
    ),
    "mm_vision_select_feature": (
        ", ".join(f"`{name}`" for name in SELECT_FEATURES),
        "What is made of the hidden states.",
    ),
    "mm_projector_type": (
        "`linear`, `mlp2x_gelu`, ..., " + ", ".join(f"`{name}`" for name in (*MERGE_NAMES, CHECKPOINT)),
        "; ".join(f"`{name}` merges {h} x {w} patches into one token" for name, (h, w) in MERGES.items())
        + "; `spatial_merge_3x3` and other squares likewise; `checkpoint` is a VLM's own projector: see "
        "[Vision towers of VLMs](families.md#vision-towers-of-vlms). The others keep one token per patch.",
    ),
    "image_aspect_ratio": (
        "`native`, `square`, `pad`, `anyres`, `anyres_max_N`, ...",
        "`native` keeps the shape of every image: see [Native resolution](native_resolution.md). "
        "The other values are unchanged.",
    ),
    "mm_patch_merge_type": (
        ", ".join(f"`{name}`" for name in MERGE_TYPES),
        "With `native`: whether a learned newline follows each row of visual tokens (`spatial_unpad`).",
    ),
    "mm_newline_position": (
        ", ".join(f"`{name}`" for name in NEWLINES),
        "With `native` and `spatial_unpad`: where the newline stands in a video.",
    ),
    "mm_spatial_pool_stride": ("whole number", "With `native`: pooling of each frame of a video (LLaVA-NeXT)."),
    "mm_spatial_pool_mode": (", ".join(f"`{name}`" for name in POOL_MODES), "With `native`: how frames are pooled."),
    "attn_implementation": (", ".join(f"`{name}`" for name in ATTENTIONS), "Attention of the language model."),
}
VALUES = {
    "mm_packing_video": ", ".join(f"`{name}`" for name in VIDEO_MODES),
    "mm_tunable_parts": ", ".join(f"`{name}`" for name in PARTS),
    "mm_packing_attention": ", ".join(f"`{name}`" for name in ("auto", *BACKENDS)),
    "attn_implementation": ", ".join(f"`{name}`" for name in ATTENTIONS),
}


def plugin_keys() -> Iterable[str]:
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    for argument in PLUGIN_ARGUMENTS:
        kind = argument.annotation.removeprefix("Optional[").removesuffix("]")
        values = VALUES.get(argument.name) or {"bool": "`true`, `false`", "int": "whole number", "str": "text"}.get(
            kind, "number"
        )
        found = DEFAULT.search(argument.help)
        default = found[1] if found else "-" if argument.default is None else f"`{str(argument.default).lower()}`"
        yield f"| `{argument.name}` | {values} | {default} | {cell(DEFAULT.sub('', argument.help))} |"


def host_keys() -> Iterable[str]:
    yield "| key | values | meaning |"
    yield "|---|---|---|"
    for key, (values, meaning) in HOST_KEYS.items():
        yield f"| `{key}` | {values} | {meaning} |"


def environment_variables() -> Iterable[str]:
    yield "| variable | values | meaning | old names |"
    yield "|---|---|---|---|"
    for variable in VARIABLES.values():
        old = ", ".join(f"`{name}`" for name in variable.old) or "-"
        yield f"| `{variable.name}` | {variable.values} | {variable.meaning} | {old} |"


def compatibility_patches() -> Iterable[str]:
    yield "| patch | module | defect | issue |"
    yield "|---|---|---|---|"
    modules = next(iter(all_hosts())).modules()
    for name, patch in sorted(compat.load_all().items()):
        module = patch.module.format(**modules)
        yield f"| `{name}` | `{module}` | {patch.reason} | {patch.issue or '-'} |"


def commands() -> Iterable[str]:
    for name, command in COMMANDS.items():
        module = import_module(f"llava_packing_tower.cli.{command.module}")
        parser = argparse.ArgumentParser(prog=f"llava-packing {name}", add_help=False)
        module.add_arguments(parser)
        yield from (
            f"## {name}",
            "",
            f"{command.help[:1].upper()}{command.help[1:]}.",
            "",
            "| argument | meaning |",
            "|---|---|",
        )
        for action in parser._actions:
            yield f"| `{label(action)}` | {cell((action.help or '').replace('%%', '%'))} |"
        if getattr(module, "TAKES_REST", False):
            yield f"| `--key value` | {REST[name]} |"
        yield ""


REST = {
    "train": "Any key of the YAML: the command line takes precedence, and `null` unsets a key.",
    "demo": "Any key of the configuration.",
    "eval": "Any other option is passed to lmms-eval.",
}


def label(action: argparse.Action) -> str:
    """An argument as it is typed."""
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    value = " ".join(value) if isinstance(value, tuple) else value
    if action.choices and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    takes = "" if action.nargs == 0 else f" {value}"
    return f"{', '.join(action.option_strings)}{takes}" if action.option_strings else str(value)


def cell(text: str) -> str:
    """A help text in a table."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


TABLES: dict[str, Callable[[], Iterable[str]]] = {
    "plugin keys": plugin_keys,
    "host keys": host_keys,
    "environment variables": environment_variables,
    "compatibility patches": compatibility_patches,
    "commands": commands,
}


def filled(text: str) -> str:
    """A page with its generated parts as the code has them now."""
    return PART.sub(lambda part: part[1] + "\n".join(TABLES[part["name"]]()).rstrip("\n") + "\n" + part[3], text)


def stale() -> list[Path]:
    """The pages that differ from the code."""
    return [page for page in sorted(DOCS.glob("*.md")) if filled(page.read_text("utf-8")) != page.read_text("utf-8")]


def main() -> int:
    pages = stale()
    check = "--check" in sys.argv[1:]
    for page in pages:
        print(f"{page.name} {'differs from the code' if check else 'written'}")
        if not check:
            page.write_text(filled(page.read_text("utf-8")), "utf-8")
    return int(check and bool(pages))


if __name__ == "__main__":
    sys.exit(main())
