"""The lmms-eval model `llava_packing`: LLaVA checkpoints with a packing tower, on LLaVA 1.x and LLaVA-NeXT."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from ...checkpoint.folder_hash import identity
from ...data.codec import SELECTORS
from ...integrations.llava import batched_inference, install
from ...integrations.llava.inference import load_checkpoint
from ...utils.supervise import watch_launcher
from .. import hf_inference
from ..reduced_images import ReducedImages
from ..refusals import refusals

DEFAULT_NEW_TOKENS = 1024
# lmms-eval puts this into every task that names no end; it would cut answers of several paragraphs.
LMMS_EVAL_DEFAULT_END = "\n\n"
PASSED_ON = ("top_p", "top_k", "num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")


class LlavaPacking(lmms):
    """A LLaVA checkpoint, or an export of one, as a model of lmms-eval.

    Args:
        pretrained: checkpoint folder. Its tower is built from it alone where it holds the tower's weights.
        model_base: what a LoRA was trained on.
        conv_template: LLaVA's conversation template (default: the one of the training, if the checkpoint knows it).
        batch_size: requests that are answered together; the images of all of them are one packed pass.
        device: "cuda", "cuda:1", "cpu"; default the GPU of this process, or the CPU.
        max_frames_num: frames that are read of each video.
        positions_thw: ``codec`` (or ``codec-video-prep``): of video files the patches in which something happens.
        weights: the identity of the weights, refused if it is another one; makes ``--use_cache`` safe.

    Raises ``ValueError`` for a checkpoint that lacks weights, or whose weights are not those that were announced.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        model_base: str | None = None,
        conv_template: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        max_frames_num: int | str = 32,
        weights: str | None = None,
        positions_thw: str | None = None,
    ) -> None:
        super().__init__()
        watch_launcher()
        exported = hf_inference.is_export(pretrained)
        self.inference = hf_inference if exported else batched_inference
        if not exported:
            install.apply()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._check_weights(pretrained, model_base, weights)
        self._device = torch.device(self._place(device))
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        if exported:
            self.loaded = hf_inference.load_checkpoint(pretrained, str(self._device))
            self.conversation = hf_inference.conversation_name(pretrained, conv_template)
        else:
            self.loaded = load_checkpoint(Path(pretrained), str(self._device), model_base and Path(model_base))
            self.conversation = batched_inference.conversation_name(self.loaded.model.config, conv_template)
        self.model = self.loaded.model
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a whole number from 1, got {batch_size!r}")
        self.batch_size = int(batch_size)
        self.max_frames = int(max_frames_num)
        if positions_thw is not None and (positions_thw not in SELECTORS or exported):
            raise ValueError(
                f"positions_thw must be one of {', '.join(SELECTORS)}, for a LLaVA checkpoint, got {positions_thw!r}"
            )
        self.reduced = ReducedImages()
        self.more = {} if positions_thw is None else {"positions_thw": positions_thw}
        tower = self.model.model.vision_tower if exported else self.model.get_vision_tower()
        print(
            f"llava_packing: rank {self._rank} of {self._world_size} on {self._device}, {type(self.model).__name__} in "
            f"{self.model.dtype}, {type(tower).__name__} in {tower.dtype}, conversation {self.conversation}, "
            f"batches of {self.batch_size}",
            flush=True,
        )

    def _check_weights(self, pretrained: str, model_base: str | None, weights: str | None) -> None:
        caching = any(word.split("=")[0] in ("--use_cache", "-c") for word in sys.argv[1:])
        if weights is None and not caching:
            return
        here = weights
        if self.accelerator.is_local_main_process:
            with tqdm(desc="reading the weights", unit="B", unit_scale=True) as bar:

                def show(done: int, count: int) -> None:
                    bar.total = count
                    bar.update(done - bar.n)

                here = identity(pretrained, model_base, show)
        if weights is None:
            raise ValueError(
                f"--use_cache identifies a model by its arguments, not by its weights, and would return the answers "
                f"of other weights at the same path. Add weights={here} to --model_args"
            )
        if str(weights) != here:
            raise ValueError(f"{pretrained} has the weights {here}, not {weights}: it has changed")

    def _place(self, device: str | None) -> str:
        if not torch.cuda.is_available():
            return "cpu"
        if device in (None, "cuda") or (self._world_size > 1 and device != "cpu"):
            return f"cuda:{self.accelerator.local_process_index}"
        return device

    # ---------------------------------------------------------------- what lmms-eval reads

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def tokenizer(self) -> object:
        return self.loaded.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def max_length(self) -> int:
        return self.loaded.context_length

    def clean(self) -> None:
        self.loaded = None
        super().clean()

    # ---------------------------------------------------------------- requests

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """An answer for each request, in their order; greedy unless its arguments ask for sampling."""
        answers: list[str] = [""] * len(requests)

        def prepared(index: int) -> object:
            context, _, to_visual, doc_id, task, split = requests[index].args
            return self._prepare(requests[index], context, to_visual, doc_id, task, split)

        # A copy: what is in the request is part of the key under which lmms-eval caches the answer.
        settings = [dict(request.args[1]) for request in requests]
        for index, answer in self._answers([request.args[0] for request in requests], prepared, settings):
            answers[index] = answer
            self.cache_hook.add_partial("generate_until", (requests[index].args[0], settings[index]), answer)
        self.reduced.report()
        return answers

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers of all rounds for each request; in each round, those that continue are asked together.

        After a round the task's ``doc_to_text`` gets a request's answers so far. It returns what is shown and asked
        next, whether it ends here instead, the answers as it wants them kept, and a note for its next call.
        """
        answers: list[list[str]] = [[] for _ in requests]
        notes: list[object] = [None] * len(requests)
        texts = [request.args[0] for request in requests]
        shown = [request.args[2] for request in requests]
        active, number = list(range(len(requests))), 0

        def prepared(place: int) -> object:
            index = active[place]
            return self._prepare(requests[index], texts[index], shown[index], *requests[index].args[4:])

        while active:
            settings = [dict(requests[index].args[1]) for index in active]
            for place, answer in self._answers([texts[index] for index in active], prepared, settings):
                answers[active[place]].append(answer)
            number += 1
            following = []
            for index in active:
                _, _, _, to_text, doc_id, task, split = requests[index].args
                visuals, text, ends, kept, notes[index] = to_text(
                    self.task_dict[task][split][doc_id],
                    previous_output=answers[index],
                    round_idx=number,
                    previous_round_info=notes[index],
                )
                answers[index] = list(kept)
                if not ends:
                    texts[index], shown[index] = text, lambda document, visuals=visuals: visuals
                    following.append(index)
            active = following
        self.reduced.report()
        return answers

    def _answers(
        self, texts: Sequence[str], prepared: Callable[[int], object], settings: Sequence[dict]
    ) -> Iterator[tuple[int, str]]:
        """Number and answer of each question, as they come."""
        groups = [json.dumps(each, sort_keys=True) for each in settings]
        for indices, questions in self._batches(texts, prepared, groups):
            options, ends = generation_options(settings[indices[0]])
            for index, ids in zip(indices, self.inference.generate(self.loaded, questions, **options)):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                yield index, cut(text, ends).strip()

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """For each request the loss of its continuation and whether it is the greedy one.

        The loss is the mean of -log p per token, as lmms-eval's wrappers for LLaVA return it: its choice is the
        smallest.
        """
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

        def prepared(index: int) -> object:
            request = requests[index]
            if len(request.args) == 2:  # a continuation without context or image
                return self.inference.prepare(
                    self.loaded, request.args[0], [], self.conversation, answer=request.args[1]
                )
            context, continuation, to_visual, doc_id, task, split = request.args
            if callable(continuation):
                continuation = continuation(self.task_dict[task][split][doc_id])
            return self._prepare(request, context, to_visual, doc_id, task, split, str(continuation))

        texts = [request.args[0] for request in requests]
        for indices, questions in self._batches(texts, prepared, [""] * len(requests)):
            for index, result in zip(indices, self.inference.losses(self.loaded, questions)):
                results[index] = result
        self.reduced.report()
        return results

    def _prepare(
        self,
        request: Instance,
        context: str,
        to_visual: Callable | None,
        doc_id: object,
        task: str,
        split: str,
        answer: str | None = None,
    ) -> object:
        with refusals(task, doc_id):
            visuals = to_visual(self.task_dict[task][split][doc_id]) if to_visual else None
            visuals = [] if visuals is None else list(visuals) if isinstance(visuals, list | tuple) else [visuals]
            for visual in visuals:
                if isinstance(visual, Image.Image):
                    visual.load()  # now, while its document is known
        metadata = request.metadata or {}
        if visuals and metadata.get("task_type") == "video" and "sample_frames" in metadata:
            count = int(metadata["sample_frames"])
            step = (len(visuals) - 1) / max(count - 1, 1)
            visuals = [[visuals[int(i * step)] for i in range(count)]]
        with refusals(task, doc_id):
            question = self.inference.prepare(
                self.loaded, context, visuals, self.conversation, self.max_frames, answer, **self.more
            )
        for number, scaling in enumerate(self.inference.scalings(self.loaded, question), 1):
            self.reduced.note(scaling, f"image {number} of task {task}, document {doc_id}")
        return question

    def _batches(
        self, texts: Sequence[str], prepared: Callable[[int], object], groups: Sequence[str]
    ) -> Iterator[tuple[list[int], list[object]]]:
        """Batches of questions of one group, the longest texts first; the next is prepared while one is answered."""
        members: dict[str, list[int]] = {}
        for index in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
            members.setdefault(groups[index], []).append(index)
        size = self.batch_size
        batches = [some[i : i + size] for some in members.values() for i in range(0, len(some), size)]
        with (
            ThreadPoolExecutor(max_workers=1) as worker,
            tqdm(total=len(texts), disable=self._rank != 0, desc="requests") as progress,
        ):
            make = lambda indices: [prepared(i) for i in indices]  # noqa: E731
            ahead = worker.submit(make, batches[0]) if batches else None
            for indices, following in zip(batches, chain(batches[1:], [None])):
                questions = ahead.result()
                ahead = worker.submit(make, following) if following else None
                yield indices, questions
                progress.update(len(indices))


def generation_options(given: dict) -> tuple[dict[str, object], list[str]]:
    """The arguments of `generate`, and the strings that end an answer, for the ``generation_kwargs`` of lmms-eval."""
    ends = given.get("until") or []
    ends = [e for e in ([ends] if isinstance(ends, str) else ends) if e and e != LMMS_EVAL_DEFAULT_END]
    temperature = given.get("temperature")
    sampled = bool(given.get("do_sample", temperature)) and temperature != 0
    options: dict[str, object] = {
        "max_new_tokens": int(given.get("max_new_tokens") or given.get("max_gen_toks") or DEFAULT_NEW_TOKENS),
        "num_beams": 1,
        "do_sample": sampled,
    }
    options.update({name: given[name] for name in PASSED_ON if given.get(name) is not None})
    if sampled:
        options["temperature"] = 1.0 if temperature is None else temperature
    else:
        options = {name: value for name, value in options.items() if name not in ("top_p", "top_k")}
    return options, ends


def cut(text: str, ends: Sequence[str]) -> str:
    """The text in front of the first of the ends."""
    return text[: min((text.find(end) for end in ends if end in text), default=len(text))]
