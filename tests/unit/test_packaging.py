"""What `pip install` brings: configurations, scripts, type information and the licence, usable away from a clone."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launch_files import need_a_host

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the content of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    # The sources alone: a build writes beside them.
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, folder / name, follow_symlinks=False)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(folder / "dist"), str(folder)], check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
        # zipfile leaves modes out, pip does not.
        scripts = [entry for entry in file.infolist() if entry.filename.endswith(".sh")]
        assert scripts and all(entry.external_attr >> 16 & 0o100 for entry in scripts)
    return folder / "site"


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file()}


def test_the_wheel_carries_everything(installed):
    package = installed / "llava_packing_tower"
    for folder in ("configs", "train_scripts"):
        assert names(package / folder) == names(REPOSITORY / folder) != set()
    assert (package / "py.typed").is_file() and (installed / "builder_patch.py").is_file()
    (licence,) = installed.glob("*.dist-info/licenses/LICENSE")
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in licence.read_text()


def test_the_packaged_demo_config_is_launched_from_an_empty_folder(installed, tmp_path):
    need_a_host()
    (tmp_path / "models").mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import llava_packing_tower as p; "
        "from llava_packing_tower.cli.demo import CONFIG; print(p.__file__, CONFIG)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(installed)], capture_output=True, text=True, cwd=tmp_path)
    package, config = out.stdout.split()
    assert Path(package).is_relative_to(installed) and Path(config).is_relative_to(installed), out.stderr
    command = [sys.executable, "-m", "llava_packing_tower", "train", config, "--num_processes", "1", "--dry_run"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    # It finds its configuration and DeepSpeed's; what it misses is what the demo makes.
    assert result.returncode == 2 and "demo_output" in result.stderr and "zero2" not in result.stderr, result.stderr


def test_who_gets_sentencepiece_gets_protobuf():
    """transformers 5 reads a sentencepiece tokenizer through both, and without the second asks for tiktoken."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    extras = {name: value.split() for name, value in setup["options.extras_require"].items()}
    assert {name for name, words in extras.items() if "sentencepiece" in words} == {"train", "train440", "demo"}
    assert all("protobuf" in words for words in extras.values() if "sentencepiece" in words)
