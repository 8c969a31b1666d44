"""Upstream's own tests and alignment scripts of the documents' time, run against the classes of this package.

    python benchmarks/upstream_documents.py CLONE_OF_OneVision-Encoder [--commit 28efa3a] [--tests HEAD]

The tests of its published package (`tests/`, at HEAD) get our classes as `onevision_encoder`. Those of the documents'
time (`model_factory/test_*.py`, `validate_*.py`), the alignment scripts and the standard models are taken from the
commit into a temporary folder; the modules of `model_factory/` here stand in for upstream's packed models and
`alignment_utils`. Each test function is called, and each alignment script is run on a small checkpoint of tests/golden,
on the CPU. A test that looks for words in the source text of upstream's files is listed as such when it fails. Needs a
transformers with the three families (4.56 or newer).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ROOT / "model_factory"
GOLDEN = ROOT / "tests" / "golden"
STANDARD = ("vit_aim_v2.py", "vit_dinov3.py", "vit_siglip2.py")
CHECKPOINTS = {
    "align_aim_v2_packing": "aimv2_native",
    "align_dinov3_packing": "dinov3",
    "align_siglip2_packing": "siglip2",
}
READS_TEXT = ("content", "getsource", "read_file")
"""Names in a test that looks for words in source text."""


def take(clone: Path, commit: str, folder: Path) -> list[str]:
    """Upstream's tests and scripts into a folder, ours over its packed models. Returns the names of the modules."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(clone), *words], check=True, capture_output=True, text=True).stdout

    names = []
    for path in git("ls-tree", "-r", "--name-only", commit, "model_factory").splitlines():
        name = Path(path).name
        if Path(path).parent.name == "model_factory" and name.endswith(".py"):
            wanted = name.startswith(("test_", "validate_", "align_"))
            if wanted or name in STANDARD:
                (folder / name).write_text(git("show", f"{commit}:{path}"))
            if wanted:
                names.append(name.removesuffix(".py"))
    shutil.copytree(GOLDEN / "llava_vit", folder / "llava_vit")
    shutil.copy(GOLDEN / "hevc_packing_tower" / "preprocessor_config.json", folder / "llava_vit")
    for file in OURS.glob("*.py"):
        if not file.name.startswith(("align_", "convert_")):
            (folder / file.name).write_text(file.read_text())
    return sorted(names)


def stand_in_for_timm() -> None:
    """Upstream's standard models register themselves with timm; where it is missing, with nothing."""
    if find_spec("timm"):
        return
    for name in ("timm", "timm.models", "timm.models.registry"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.registry"].register_model = lambda entry: entry


def called(function: Callable, *arguments: object) -> tuple[bool, str]:
    """Whether a test passes (it returns nothing, True or 0), and the last line of what it prints or raises."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            result = function(*arguments)
    except SystemExit as ended:
        return ended.code in (0, None), f"exit status {ended.code}"
    except Exception as error:
        return False, "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    lines = [line for line in printed.getvalue().splitlines() if line.strip("=- ")]
    failed = [line for line in lines if "✗" in line or "❌" in line or "Error" in line]
    passed = result is None or result is True or isinstance(result, types.ModuleType)
    passed = passed or (isinstance(result, int) and not isinstance(result, bool) and result == 0)
    return passed, (failed or lines or [""])[-1].strip()


def run_module(name: str, folder: Path) -> list[tuple[str, bool, str]]:
    """Rows of (test, passed, note) of one file."""
    if name in CHECKPOINTS:
        sys.argv = [name, "--ckpt", str(GOLDEN / CHECKPOINTS[name]), "--device", "cpu", "--image_size", "48"]
        passed, note = called(importlib.import_module(name).main)
        return [(f"{name} (48 pixels)", passed, note)]
    if name.endswith("imports"):  # its tests are its body
        return [(name, *called(importlib.import_module, name))]
    module = importlib.import_module(name)
    rows = []
    for test in [test for test in vars(module) if test.startswith("test_")]:
        function = getattr(module, test)
        arguments = (str(folder / "llava_vit"),) if "repo_id" in function.__code__.co_varnames[:1] else ()
        passed, note = called(function, *arguments)
        if not passed and any(
            word in function.__code__.co_names + function.__code__.co_varnames for word in READS_TEXT
        ):
            note = f"looks for words in upstream's source: {note}"
        rows.append((f"{name}.{test}", passed, note))
    return rows


def of_the_package(clone: Path, commit: str) -> list[tuple[str, bool, str]]:
    """The tests of upstream's package, which need no hub and no GPU, in a process of pytest."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("test_consistency.py", "test_onevision_encoder.py"):
            text = subprocess.run(
                ["git", "-C", str(clone), "show", f"{commit}:tests/{name}"], check=True, capture_output=True, text=True
            )
            (folder / "tests").mkdir(exist_ok=True)
            (folder / "tests" / name).write_text(text.stdout)
        (folder / "onevision_encoder").mkdir()
        (folder / "onevision_encoder" / "__init__.py").write_text(
            "from llava_packing_tower.models.llava_vit.standard import OneVisionEncoderConfig, OneVisionEncoderModel\n"
        )
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=line", "-p", "no:cacheprovider", "tests"]
        paths = os.pathsep.join([scratch, str(ROOT)])
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
        )
    rows = []
    for line in done.stdout.splitlines():
        word, _, rest = line.partition(" ")
        if word in ("PASSED", "FAILED"):
            test, _, note = rest.partition(" - ")
            rows.append((test, word == "PASSED", note))
        elif word == "SKIPPED":
            print(f"skip  {rest}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--commit", default="28efa3a")
    parser.add_argument("--tests", default="HEAD")
    args = parser.parse_args()
    import llava_packing_tower
    import llava_packing_tower.models.llava_vit.standard  # noqa: F401

    stand_in_for_timm()
    rows = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        sys.path.insert(0, scratch)
        for name in take(args.clone, args.commit, Path(scratch)):
            try:
                rows += run_module(name, Path(scratch))
            except Exception as error:
                rows.append((name, False, f"{type(error).__name__}: {error}"))
    rows += of_the_package(args.clone, args.tests)
    for test, passed, note in rows:
        print(f"{'pass' if passed else 'FAIL'}  {test}{'' if passed else f': {note}'}")
    failed = sum(not passed for _, passed, _ in rows)
    print(f"{len(rows) - failed} pass, {failed} fail")
    return 0


if __name__ == "__main__":
    sys.exit(main())
