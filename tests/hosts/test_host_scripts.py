"""LLaVA-NeXT's own scripts, unedited, through `llava-packing run`, where flash-attn is missing."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from host_runs import NEEDS_NEXT, NEXT, REPOSITORY, environment, execute
from PIL import Image

from llava_packing_tower.utils.net import free_port

pytestmark = [*NEEDS_NEXT, pytest.mark.timeout(900)]
RUN = [sys.executable, "-m", "llava_packing_tower", "run", "--", "python"]
SDPA = "flash-attn cannot be used here: the decoder is loaded with sdpa attention"
no_cuda = {"CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}


def needs(module: str):
    return pytest.mark.skipif(find_spec(module) is None, reason=f"the script imports {module}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Checkpoints, a photo and empty modules for what the video demo imports and does not use here."""
    folder = tmp_path_factory.mktemp("scripts")
    result = execute(
        [sys.executable, str(Path(__file__).parents[1] / "helpers" / "host_scripts.py"), str(folder)], env_of(folder)
    )
    assert result.returncode == 0, result.stderr
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    (folder / "stubs").mkdir()
    for name in ("cv2", "openai"):
        (folder / "stubs" / f"{name}.py").touch()
    return folder


def env_of(folder: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), str(folder / "stubs"), os.environ.get("PYTHONPATH")]))
    return {**environment(NEXT), **no_cuda, "PYTHONPATH": path}


def run(folder: Path, *words: object) -> str:
    result = execute([*RUN, *map(str, words)], env_of(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    assert SDPA in result.stderr
    return result.stdout


def test_cli(root):
    words = ["-m", "llava.serve.cli", "--model-path", root / "llava_llama_run", "--image-file", root / "a.png"]
    # Its questions come from stdin, which is empty: it loads, prepares the photo, and ends.
    assert "exit..." in run(root, *words, "--conv-mode", "v1")


@needs("shortuuid")
def test_model_vqa(root, tmp_path):
    turns = [("human", "<image>\nWhat?"), ("gpt", "cat"), ("human", "And?"), ("gpt", "cup")]
    sample = {
        "sample_id": 7,
        "metadata": {"question_type": "open", "dataset": "d"},
        "image": ["a.png"],
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }
    (tmp_path / "q.json").write_text(json.dumps([sample]))
    words = ["-m", "llava.eval.model_vqa", "--model-path", root / "llava_qwen_run", "--image-folder", root]
    answers = tmp_path / "out" / "a.jsonl"
    run(root, *words, "--question-file", tmp_path / "q.json", "--answers-file", answers, "--temperature", "0")
    assert [json.loads(line)["gt_response"] for line in answers.read_text().splitlines()] == ["cat", "cup"]


def test_merge_lora_weights(root, tmp_path):
    script = Path(NEXT) / "scripts" / "archived" / "merge_lora_weights.py"
    words = [script, "--model-path", root / "llava_llama_lora", "--model-base", root / "decoder"]
    run(root, *words, "--save-model-path", tmp_path / "llava_llama_merged")
    assert (tmp_path / "llava_llama_merged" / "model.safetensors").is_file()


@needs("decord")
@needs("av")
def test_video_demo(root, tmp_path):
    import av

    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for seed in range(9):
            pixels = np.random.default_rng(seed).integers(0, 255, (64, 96, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    words = [Path(NEXT) / "playground" / "demo" / "video_demo.py", "--model-path", root / "llava_llama_run"]
    words += ["--video_path", tmp_path / "v.mp4", "--output_dir", tmp_path / "out", "--output_name", "x"]
    run(root, *words, "--prompt", "What?", "--conv-mode", "v1", "--mm_spatial_pool_stride", "2")
    assert json.loads((tmp_path / "out" / "x.json").read_text())["Q"] == "What?"


class Controller(BaseHTTPRequestHandler):
    """What the worker tells that it is alive; without it, it would try for ever."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"exist": true}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def post(address: str, content: dict) -> bytes:
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60).read()


@needs("uvicorn")
@needs("fastapi")
def test_model_worker(root, tmp_path):
    controller = HTTPServer(("127.0.0.1", 0), Controller)
    threading.Thread(target=controller.serve_forever, daemon=True).start()
    port = free_port()
    words = ["-m", "llava.serve.model_worker", "--model-path", str(root / "llava_llama_run"), "--no-register"]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    words += ["--controller-address", f"http://127.0.0.1:{controller.server_port}"]
    log = tmp_path / "log"
    with open(log, "w") as file:  # in a folder of its own: it writes a log where it runs
        process = subprocess.Popen(
            [*RUN, *words], cwd=tmp_path, env=env_of(root), stdout=file, stderr=file, start_new_session=True
        )
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            try:
                post(f"http://127.0.0.1:{port}/worker_get_status", {})
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        photo = base64.b64encode((root / "a.png").read_bytes()).decode()
        question = {"prompt": "USER: <image>\nWhat? ASSISTANT:", "images": [photo], "temperature": 0, "stop": "</s>"}
        answer = post(f"http://127.0.0.1:{port}/worker_generate_stream", {**question, "max_new_tokens": 4})
        parts = [json.loads(part) for part in answer.split(b"\0") if part]
        assert parts and all(part["error_code"] == 0 for part in parts), log.read_text()
        assert SDPA in log.read_text()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        controller.shutdown()


@pytest.mark.parametrize("script", [False, True])
def test_train_dpo_is_refused_by_name(script):
    words = [f"{NEXT}/llava/train/train_dpo.py"] if script else ["-m", "llava.train.train_dpo"]
    result = execute([*RUN, *words], environment(NEXT))
    assert result.returncode != 0 and "start it by `llava-packing train` with `trainer: dpo`" in result.stderr
    assert "Traceback" not in result.stderr


def test_train_dpo_is_refused_where_it_is_imported():
    code = "import builder_patch\nimport llava.train.train_dpo"
    result = execute([sys.executable, "-c", code], environment(NEXT))
    assert result.returncode != 0 and "ImportError: llava.train.train_dpo: start it by" in result.stderr
