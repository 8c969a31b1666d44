"""Every block of code in README, CONTRIBUTING and docs is run, or checked where it would install, train or measure.

``tests/helpers/doc_blocks.py`` has the table of what stands in for checkpoints, hub ids and GPUs. A block that no rule
here covers fails.
"""

from __future__ import annotations

import ast
import builtins
import configparser
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers
import warm
import yaml
from code_messages import messages
from doc_blocks import EXPORTED, MORE, PAGES, ROOT, UNKNOWN_TO_PYTHON, Block, blocks, commands, stand_in, workspace
from launch_files import need_a_host

from llava_packing_tower.cli.main import COMMANDS, main
from llava_packing_tower.hf.auto import is_supported
from llava_packing_tower.integrations.llava import compat
from llava_packing_tower.integrations.llava.registry import all_hosts, find_host
from llava_packing_tower.models.llava_vit import presets
from llava_packing_tower.tools.bench.workloads import parse_workload
from llava_packing_tower.train.config import read_overrides, read_yaml
from llava_packing_tower.train.launcher import ALIASES, TRAINER_KEY, known_arguments
from llava_packing_tower.utils import environment

NEXT = os.environ.get("LLAVA_NEXT_DIR")
TINY = dict(zip(presets.SIZE_FIELDS, (32, 64, 3, 2, 96)))
BLOCKS = [block for page in PAGES for block in blocks(page)]
CAN_LOAD = is_supported(transformers.__version__)
HAS_FAMILIES = hasattr(transformers, "Siglip2VisionModel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("docs"))


class Reader:
    """A reader who does what a page says, in the folder with the stand-ins."""

    examined: ClassVar[set[tuple[str, ...]]] = set()

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.printed = ""
        self.moved: list[tuple[Path, Path]] = []
        self.module = types.ModuleType("a_page_of_the_docs")
        monkeypatch.setitem(sys.modules, self.module.__name__, self.module)

    # ------------------------------------------------------------ bash

    def bash(self, block: Block) -> None:
        for words in commands(block.with_stand_ins()):
            while re.fullmatch(r"[A-Z_]+=.*", words[0]):
                self.export(words.pop(0))
            self.command(words)

    def command(self, words: list[str]) -> None:
        words = [word for word in words if word != "..."]  # the reader's own words
        match words:
            case ["export", assignment]:
                self.export(assignment)
            case ["git", "clone", address]:
                assert address in setup()["metadata"]["project_urls"], f"setup.cfg does not name {address}"
            case ["pip", "install", *what]:
                self.pip(what)
            case ["make", *targets]:
                made = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
                assert made.returncode == 0, made.stderr
            case [".venv/bin/pre-commit", "install"]:
                assert (ROOT / ".pre-commit-config.yaml").is_file() and "pre-commit" in names_of_packages()
            case ["llava-packing", "run", "--", *program] | ["torchrun", *program]:
                self.through_the_hook(program)
            case ["llava-packing", name, *rest]:
                self.ours(name, rest)
            case ["vllm", "serve", folder, *_]:  # tests/hosts/test_vllm.py serves one
                self.make_export()
                assert (self.folder / folder / "chat_template.jinja").is_file()
            case ["python", "-c", code]:
                self.execute(code)
            case ["python", "-m", module, *rest]:
                assert module == "lmms_eval", module
                self.help_has(["-m", "lmms_eval", "eval"], rest)
            case ["python", file, *rest]:
                self.benchmark(file, rest)
            case [first, *_] if first.startswith("--"):  # arguments of a training script
                self.ours("train", ["base.yaml", *words])
            case _:
                pytest.fail(f"no rule for the command {' '.join(words)}")

    def export(self, assignment: str) -> None:
        name, _, value = assignment.partition("=")
        assert name in environment.VARIABLES, name
        if name == environment.DISABLE_PATCHES:
            assert set(value.split(",")) <= compat.load_all().keys()
        if name != environment.NEXT_DIR:  # the host of the tests stays
            self.monkeypatch.setenv(name, value)

    def pip(self, words: list[str]) -> None:
        words = list(words)
        while words:
            word = words.pop(0)
            if word in ("-r", "--requirement"):
                assert (self.folder / words.pop(0)).is_file()
            elif extra := re.fullmatch(r"\.(?:\[(\w+)\])?", word):
                assert extra[1] is None or extra[1] in setup()["options.extras_require"], word
            elif word.startswith("-"):
                assert word in ("--no-deps", "--no-build-isolation", "-e", "--editable", "-U"), word
            else:
                assert re.split(r"[<>=\[!~]", word)[0].lower() in names_of_packages(), word

    def ours(self, name: str, words: list[str]) -> None:
        """A command of this package, in this process. What is written over is what an earlier line has written."""
        assert name in COMMANDS, name
        if name in ("export", "import"):
            self.in_a_process_of_its_own(name, words)
            return
        if name == "doctor" and (name, *words) in self.examined:  # half a minute on a busy machine
            return
        for flag in ("--output_dir", "--output_path"):
            if name != "train" and flag in words:
                self.set_aside(self.folder / words[words.index(flag) + 1])
        if name == "convert" and "--output_dir" not in words:
            for ending in ("_packing", "_standard"):
                self.set_aside(self.folder / f"{words[0]}{ending}")
                self.set_aside(self.folder / f"{Path(words[0]).name}{ending}")  # of a hub id
        if name == "train":
            self.base_yaml()
            if not NEXT:
                words = [*words, "--version", "v1"]
        if name == "bench" and "--work" in words:
            for work in words[words.index("--work") + 1].split(","):
                parse_workload(work, patch_size=14)
        if name == "eval":
            if words[0].startswith("exported"):
                self.make_export()
                if not CAN_LOAD:
                    assert main([name, *words]) == 2 and "needs transformers 4.57" in self.capsys.readouterr().err
                    return
            self.monkeypatch.setattr("llava_packing_tower.eval.runner.run_tasks", lambda evaluation, tasks, _: {})
        words = [*words, *MORE.get(name, "").split()]
        if "--training-step" in words:  # in another process, for it changes LLaVA
            if NEXT:
                self.printed += self.python(["-m", "llava_packing_tower", name, *words, "--rows", "stock,4-ckpt"])
            return
        if words.count("--num_processes") > 1:
            where = words.index("--num_processes")
            del words[where : where + 2]
        status = main([name, *words])
        output = self.capsys.readouterr()
        self.printed += output.out
        torch.set_default_dtype(torch.float32)
        if name == "doctor":
            assert status in (0, 1)  # what it finds is this machine's
            self.examined.add((name, *words))
        elif status == 2 and name == "train" and not NEXT and "LLaVA-NeXT has it" in output.err:
            return
        elif name == "align" and not HAS_FAMILIES:
            assert status == 2 and "transformers" in output.err
        else:
            assert status == 0, f"{name} {' '.join(words)}\n{output.out}\n{output.err}"

    def in_a_process_of_its_own(self, name: str, words: list[str]) -> None:
        """`export` and `import`, of a whole LLaVA: those that the pages name are only as much as `eval` asks of."""
        self.make_export()
        words = ["checkpoints/whole" if word == "checkpoints/llava_qwen_packing" else word for word in words]
        for folder in ("exported/run1_lora", "checkpoints/run1_again", "checkpoints/run1_lora"):
            self.set_aside(self.folder / folder)
        if "exported/run1_lora" in words:  # what a block of Python writes
            shutil.copytree(self.folder / "exported" / "run1", self.folder / "exported" / "run1_lora")
        if name == "export":
            self.set_aside(self.folder / words[words.index("--output_dir") + 1])
        self.printed += self.python(["-m", "llava_packing_tower", name, *words])

    def make_export(self) -> None:
        need_a_host()
        if not (self.folder / "exported").exists():
            self.python(["-c", EXPORTED, str(self.folder)])

    def set_aside(self, path: Path) -> None:
        """Out of the way of the next command; :meth:`put_back` undoes it."""
        if path.exists():
            aside = self.folder / "aside" / str(len(self.moved))
            aside.parent.mkdir(exist_ok=True)
            self.moved.append((path, path.rename(aside)))

    def put_back(self) -> None:
        for path, aside in reversed(self.moved):
            shutil.rmtree(path, ignore_errors=True)
            aside.rename(path)
        self.moved.clear()

    def base_yaml(self) -> None:
        """A complete configuration for pages that show a part of one; README's is complete."""
        values = {
            "model_name_or_path": "Qwen/Qwen2-7B-Instruct",
            "mm_vision_tower": "checkpoints/llava_vit_large_packing",
            "data_path": "data/train.json",
            "image_folder": "data/images",
            "output_dir": "checkpoints/llava_qwen_part",
            "bf16": True,
        }
        (self.folder / "base.yaml").write_text(yaml.safe_dump(values))
        whole = [block for block in BLOCKS if block.language == "yaml" and "model_name_or_path" in block.text]
        (self.folder / "train.yaml").write_text(whole[0].text)

    def through_the_hook(self, words: list[str]) -> None:
        words = [word for word in words if word not in ("--nproc_per_node", "2")]
        if words[:2] == ["-m", "llava_packing_tower.run"]:
            result = self.python(["-m", "llava_packing_tower.run", *words[2:]])
            assert "a script ran with" in result
        else:
            assert words[:2] == ["python", "-m"], words
            self.help_has(["-m", "llava_packing_tower.run", "-m", words[2]], words[3:])

    def help_has(self, program: list[str], words: list[str]) -> None:
        """Another package's program: its --help must have every option."""
        for package in ("llava", "lmms_eval"):
            if any(word.startswith(package) for word in program) and find_spec(package) is None and not NEXT:
                pytest.skip(f"{package} is not installed")
        text = self.python([*program, "--help"])
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"(?<!\S){option}\b", text), f"{' '.join(program)} has no {option}"

    def benchmark(self, file: str, words: list[str]) -> None:
        """A script of benchmarks/: it exists and takes these options. It measures for minutes and is not run."""
        tree = ast.parse((self.folder / file).read_text("utf-8"))
        texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        given = {word for word in words if word.startswith("--")}
        assert given <= texts, f"{file} has no {given - texts}"

    def python(self, words: list[str]) -> str:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
        env = {**os.environ, "PYTHONPATH": path}
        result = warm.execute([sys.executable, *words], env, timeout=500, cwd=self.folder)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        return result.stdout

    # ------------------------------------------------------------ the other languages

    def execute(self, code: str) -> None:
        """Python, in this process; in another where LLaVA is changed."""
        code = f"{supplied(code, set(vars(self.module)))}\n{stand_in(code)}"
        if "openai" in code:  # tests/hosts/test_vllm.py asks a server
            compile(code, "a block of the docs", "exec")
            return
        if "AutoModelForImageTextToText" in code:
            if not CAN_LOAD:
                pytest.skip("exports need transformers 4.57")
            self.make_export()
        if changes_llava(code):
            need_a_host()
            self.python(["-c", code])
        else:
            exec(compile(code, "a block of the docs", "exec"), vars(self.module))
            self.capsys.readouterr()

    def python_block(self, block: Block) -> None:
        earlier = [b for b in BLOCKS if (b.page, b.language) == (block.page, "python") and b.line < block.line]
        for part in [*(b for b in earlier if not changes_llava(b.text)), block]:
            self.execute(part.text)

    def yaml(self, block: Block) -> None:
        need_a_host()
        file = self.folder / "part.yaml"
        file.write_text(block.text)
        values, found = read_yaml(file), find_host()
        if trainer := values.get(TRAINER_KEY):
            if not NEXT:
                pytest.skip("LLAVA_NEXT_DIR is not set")
            found = replace(found, host=found.host.with_trainer(trainer))
        known = set(known_arguments(found)) | set().union(*(host.own_arguments for host in all_hosts()))
        assert {ALIASES.get(key, key) for key in values.keys() - {TRAINER_KEY}} <= known
        words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        assert read_overrides(words).keys() == values.keys()
        self.ours("train", ["base.yaml", *words])

    def json(self, block: Block) -> None:
        """One sample of training data."""
        need_a_host()
        (self.folder / "sample.json").write_text(json.dumps([json.loads(block.text)]))
        words = ["--data_path", "sample.json", "--image_folder", ".", "--image_aspect_ratio", "native"]
        self.ours("train", ["base.yaml", *words])

    def output(self, block: Block) -> None:
        """What a program prints: it was printed by a command of the page, or is made of texts in the code."""
        lines = block.text.splitlines()
        shown = [line[2:] for line in lines if line.startswith("$ ")]
        for line in shown:
            for words in commands(stand_in(line)):
                self.command(words)
        for line in lines:
            if line.strip() and not line.startswith("$ "):
                assert plain(line) in plain(self.printed) or all(map(in_the_code, re.split(r" {2,}", line.strip()))), (
                    line
                )


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def names_of_packages() -> set[str]:
    """What setup.cfg and requirements/ name."""
    config = setup()
    lines = [config["metadata"]["name"], *config["options"]["install_requires"].split("\n")]
    for extra in config["options.extras_require"].values():
        lines += extra.split("\n")
    for file in (ROOT / "requirements").glob("*.txt"):
        lines += file.read_text("utf-8").splitlines()
    return {re.split(r"[<>=\[!~; ]", line.strip())[0].lower() for line in lines}


def changes_llava(code: str) -> bool:
    return "builder_patch" in code or "integrations.llava" in code


def supplied(code: str, known: set[str]) -> str:
    """The lines that make what a block takes for granted. A name that is not in the table is an error of the page."""
    tree = ast.parse(code)
    made = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} | known
    made |= {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    made |= {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)} | set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            made |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    wanted = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - made
    assert wanted <= UNKNOWN_TO_PYTHON.keys(), f"the page does not say what {wanted - UNKNOWN_TO_PYTHON.keys()} is"
    lines = [f"{name} = {value}" for name, value in UNKNOWN_TO_PYTHON.items() if name in wanted]
    if any("model" in line for line in lines):  # `model` is a LLaVA, and comes before what is taken from it
        lines = ["import builder_patch", *lines]
    return "\n".join(["import torch", "from PIL import Image", *lines])


def plain(text: str) -> str:
    """Without the numbers and the widths of columns."""
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "0", text)).strip()


def in_the_code(cell: str) -> bool:
    if not re.search(r"[A-Za-z]", re.sub(r"\d+x\d+|e[-+]\d+|\bto\b", "", cell)):
        return True  # numbers, their ranges, bars
    return any(pattern.fullmatch(plain(cell)) for pattern in templates())


@functools.cache
def templates() -> list[re.Pattern]:
    """The short texts of the code, without their numbers; anything may stand where they are filled in."""
    found = set()
    for text in messages():
        parts = [plain(part) for part in text.split("...")]
        if len("".join(parts)) > 3 and len(text) < 200 and len(parts) < 9:
            found.add(".*?".join(map(re.escape, parts)))
    return [re.compile(pattern) for pattern in sorted(found)]


RULES = {
    "bash": Reader.bash,
    "python": Reader.python_block,
    "yaml": Reader.yaml,
    "json": Reader.json,
    "": Reader.output,
}


def is_newest(block: Block) -> bool:
    """Whether a block is run with the newest transformers too."""
    return "align" in block.text or (block.page.name == "export.md" and block.language == "python")


def marks(block: Block) -> list[pytest.MarkDecorator]:
    """A whole LLaVA that is exported and imported, and benchmarks, are long: test_export.py and test_bench_command.py
    have them in every run."""
    long = block.language == "bash" and re.search(r"^llava-packing (export|import|bench)\b", block.text, re.MULTILINE)
    return [pytest.mark.long] * bool(long) + [pytest.mark.newest] * is_newest(block)


@pytest.mark.timeout(900)  # conversion.md verifies three checkpoints on photographs
@pytest.mark.parametrize(
    "block",
    [pytest.param(b, marks=marks(b)) for b in BLOCKS],
    ids=str,
)
def test_block(block, folder, monkeypatch, capsys):
    assert block.language in RULES, f"no rule for blocks of {block.language!r}"
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, preset in list(presets.PRESETS.items()):
        monkeypatch.setitem(presets.PRESETS, name, presets.Preset(name, preset.form, {**preset.fields, **TINY}))
    reader = Reader(folder, monkeypatch, capsys)
    try:
        RULES[block.language](reader, block)
    finally:
        reader.put_back()


def test_every_page_is_read():
    fences = sum(len(re.findall(r"^ *(?:```|~~~)", page.read_text("utf-8"), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(BLOCKS) and len(BLOCKS) > 30


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("toml", "a = 1"),
        ("bash", "curl https://example.com"),
        ("bash", "llava-packing convert checkpoints/hevc_vit_large --no_such_option"),
        ("bash", "llava-packing bench --work unheard3"),
        ("bash", "pip install no-such-package-of-ours"),
        ("bash", "make no_such_target"),
        ("bash", "export NO_SUCH_VARIABLE=1"),
        ("bash", "python benchmarks/eval_throughput.py --no_such_option 1"),
        ("python", "print(name_that_the_page_never_made)"),
        ("yaml", "no_such_key: 1"),
        ("", "a line that no command prints"),
    ],
)
def test_a_wrong_block_fails(language, text, folder, monkeypatch, capsys):
    with pytest.raises((AssertionError, SystemExit, ValueError, pytest.fail.Exception)):
        test_block(Block(ROOT / "README.md", 1, language, text), folder, monkeypatch, capsys)
