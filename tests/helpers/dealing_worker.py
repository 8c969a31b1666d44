"""One of several processes that train a tiny LLaVA with the host's own trainer, dealt and undealt.

``torchrun dealing_worker.py FOLDER ENGINE:RUN...`` prints, on rank 0, a JSON object for each run (a name of RUNS), and
leaves the gradients of every optimizer step in FOLDER, or under FSDP the weights at the end.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

if any(word.startswith("fsdp:") for word in sys.argv):
    sys.argv += ["--fsdp", "full_shard"]  # what the compat patches for FSDP look for

import builder_patch  # noqa: F401

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from distributed_worker import DEEPSPEED, make_checkpoint
from llava import conversation
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.train import train
from llava.train.llava_trainer import LLaVATrainer
from PIL import Image
from transformers import AutoTokenizer, TrainerCallback

from llava_packing_tower.integrations.llava import packed_step
from llava_packing_tower.tools.demo.tiny_models import make_tokenizer

WORDS = ("cat", "moon", "cup", "tall green tree", "a very small boat on the sea")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
SAMPLES, BATCH, ACCUMULATION, LIMIT, BUDGET = 50, 3, 2, 150, 230
RUNS = {
    "own": {"mm_packing_balance": False},  # and the model's step is LLaVA's own as well
    "host": {"mm_packing_balance": False},
    "dealt": {},
    "full logits": {"mm_packing_full_logits": True},
    "tokens": {"mm_packing_loss_average": "tokens"},
    "tokens undealt": {"mm_packing_loss_average": "tokens", "mm_packing_balance": False},
    "budget": {"mm_packing_batch_tokens": BUDGET},
    "large budget": {"mm_packing_batch_tokens": 100000},
    "refused": {"mm_packing_batch_tokens": 120},
    "truncated": {"mm_packing_batch_tokens": 120, "mm_packing_over_budget": "truncate"},
    "truncated host": {"mm_packing_balance": False, "tokenizer_model_max_length": 120},
    "missing host": {"mm_packing_balance": False},
    "missing": {},
    # The model takes num_items_in_batch, and the trainer averages over the tokens of the step ("items"); by our key.
    "items host": {"mm_packing_balance": False},
    "items": {},
    "items tokens": {"mm_packing_loss_average": "tokens"},
    "items budget": {"mm_packing_batch_tokens": BUDGET},
    "fitting tokens": {"mm_packing_loss_average": "tokens"},
    "saved": {"mm_packing_batch_tokens": BUDGET},
    "resumed": {"mm_packing_batch_tokens": BUDGET},
}
SAVED = 5  # in the second of two epochs


def make_workspace(folder: Path) -> None:
    """A checkpoint, its tokenizer, ragged photos; samples without images, without labels, and cut at the limit."""
    texts = [f"{SYSTEM}USER: <image>\nWhat is it ? ASSISTANT: {word}</s>" for word in WORDS]
    tokenizer = make_tokenizer(folder / "llava_tiny", texts, WORDS)
    make_checkpoint(str(folder), len(tokenizer), LIMIT)
    chance, noise, data = random.Random(3), np.random.default_rng(0), []
    for number in range(SAMPLES):
        turns = [("human", "What is it ?"), ("gpt", chance.choice(WORDS))] * chance.choice((1, 1, 2, 4))
        sample = {"id": f"sample {number}"}
        if number % 5:
            width, height = (4 * chance.randint(1, 4 if number % 7 else 9) for _ in range(2))
            pixels = noise.integers(0, 255, (height, width, 3), dtype=np.uint8)
            sample["image"] = f"{number}.png"
            Image.fromarray(pixels).save(folder / sample["image"])
            turns[0] = ("human", "<image>\n" + turns[0][1])
        if number % 11 == 3:  # everything that has a label is cut
            turns[0] = (turns[0][0], turns[0][1] + " tree" * 200)
        sample["conversations"] = [{"from": who, "value": what} for who, what in turns]
        data.append(sample)
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "whole.json").write_text(json.dumps(data[:48]))  # epochs of whole optimizer steps
    fitting = [sample for number, sample in enumerate(data) if number % 11 != 3]  # none is cut
    (folder / "fitting.json").write_text(json.dumps(fitting[:36]))
    for number in (11, 27):
        data[number]["image"] = "missing.png"
    (folder / "missing.json").write_text(json.dumps(data))


class TakesItems(LlavaLlamaForCausalLM):
    """LLaVA's own, but what the trainer has to say about the loss reaches it."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, images=None, image_sizes=None, **kwargs):
        made = self.prepare_inputs_labels_for_multimodal(
            input_ids, None, attention_mask, None, labels, images, image_sizes
        )
        given = {"position_ids": made[1], "attention_mask": made[2], "inputs_embeds": made[4], "labels": made[5]}
        return super(LlavaLlamaForCausalLM, self).forward(**given, **kwargs)


class Watch(TrainerCallback):
    """Gradients of every optimizer step, the indices that were read, the tokens of every micro-batch."""

    def __init__(self) -> None:
        self.gradients, self.read, self.tokens, self.supervised, self.ends = [], [], [], [], []
        self.step = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ends.append(len(self.read))

    @contextlib.contextmanager
    def watching(self, model, engine, own):
        dataset, get = train.LazySupervisedDataset, train.LazySupervisedDataset.__getitem__
        step_of, is_step = packed_step.packed_step, packed_step.is_training_step
        watch = self

        def getitem(self, i):
            watch.read.append(i)
            return get(self, i)

        def count(given):
            mask = given.get("attention_mask")
            watch.supervised.append((watch.step, int((given["labels"][:, 1:] != -100).sum())))
            watch.tokens.append(int(mask.sum()) if mask is not None else given["labels"].numel())

        def counted(decoder, plan, given):
            count(given)
            return step_of(decoder, plan, given)

        def asked(decoder, given):
            if own and given.get("labels") is not None:
                count(given)
            return not own and is_step(decoder, given)

        if engine == "fsdp":
            owner, step, stepped = torch.optim.SGD, torch.optim.SGD.step, torch.optim.SGD.step
        elif not engine.startswith("zero"):
            owner, step = torch.optim.SGD, torch.optim.SGD.step

            def stepped(self, *args, **kwargs):
                watch.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
                return step(self, *args, **kwargs)
        else:
            from deepspeed import DeepSpeedEngine as owner
            from deepspeed.utils import safe_get_full_grad

            step = owner.step

            def stepped(self, *args, **kwargs):
                if self.is_gradient_accumulation_boundary():
                    found = {n: safe_get_full_grad(p) for n, p in model.named_parameters()}
                    watch.gradients.append({n: g.clone() for n, g in found.items() if g is not None})
                return step(self, *args, **kwargs)

        dataset.__getitem__, owner.step = getitem, stepped
        packed_step.packed_step, packed_step.is_training_step = counted, asked
        try:
            yield
        finally:
            dataset.__getitem__, owner.step = get, step
            packed_step.packed_step, packed_step.is_training_step = step_of, is_step


def run(folder: Path, engine: str, name: str) -> dict:
    whole, fitting = name in ("saved", "resumed"), name.startswith(("items", "fitting"))
    # The same samples in a step on one rank as on two.
    batch = BATCH * 2 // dist.get_world_size() if fitting else BATCH
    stage = int(engine[-1]) if engine.startswith("zero") else None
    config = {**DEEPSPEED, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    config |= {"train_micro_batch_size_per_gpu": batch, "gradient_accumulation_steps": ACCUMULATION}
    args = train.TrainingArguments(
        output_dir=str(folder / f"{engine} saved"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=ACCUMULATION,
        num_train_epochs=2,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="steps" if name == "saved" else "no",
        save_steps=SAVED,
        report_to=[],
        seed=11,
        remove_unused_columns=False,
        dataloader_num_workers=2 * whole,
        fsdp="full_shard auto_wrap" if engine == "fsdp" else "",
        deepspeed=config if stage is not None else None,
        ddp_find_unused_parameters=False,
    )
    cls = TakesItems if name.startswith("items") else LlavaLlamaForCausalLM
    model = cls.from_pretrained(folder / "llava_tiny", torch_dtype=torch.float32)
    for key, value in RUNS[name].items():
        setattr(model.config, key, value)
    tower = model.get_vision_tower()
    tokenizer = AutoTokenizer.from_pretrained(folder / "llava_tiny", model_max_length=LIMIT, use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token
    conversation.default_conversation = conversation.conv_templates["v1"]
    data = "whole" if whole else "fitting" if fitting else "missing" if "missing" in name else "data"
    data_args = SimpleNamespace(
        data_path=str(folder / f"{data}.json"),
        image_folder=str(folder),
        video_folder=None,
        is_multimodal=True,
        image_aspect_ratio="native",
        mm_use_im_start_end=False,
        image_processor=tower.image_processor,
        early_mix_text=False,
    )
    module = train.make_supervised_data_module(tokenizer=tokenizer, data_args=data_args)
    model.requires_grad_(True)
    for number, _ in enumerate(tower.vision_tower.encoder.layers):
        if number > 1:  # above the selected layer
            tower.vision_tower.encoder.layers[number].requires_grad_(False)
    watch = Watch()
    trainer = LLaVATrainer(model=model, tokenizer=tokenizer, args=args, callbacks=[watch], **module)
    with watch.watching(model, engine, name == "own"):
        trainer.train(
            resume_from_checkpoint=str(folder / f"{engine} saved/checkpoint-{SAVED}") if name == "resumed" else None
        )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    shares: list = [None] * dist.get_world_size()
    mine = {"read": watch.read, "ends": watch.ends, "tokens": watch.tokens, "supervised": watch.supervised}
    dist.all_gather_object(shares, mine)
    result = {"losses": losses, "steps": trainer.state.global_step, "ranks": shares}
    found = watch.gradients
    if engine == "fsdp":
        summon = getattr(type(trainer.model), "summon_full_params", None)  # FSDP 1
        with summon(trainer.model, writeback=False) if summon else contextlib.nullcontext():
            whole = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in trainer.model.named_parameters()}
            found = [{n: p.detach().clone() for n, p in whole.items()}]
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{engine} {name}.pt")
    del trainer, model
    gc.collect()
    return result


def main() -> None:
    folder, words = Path(sys.argv[1]), [word for word in sys.argv[2:] if ":" in word]
    dist.init_process_group("gloo")
    if dist.get_rank() == 0 and not (folder / "data.json").exists():
        make_workspace(folder)
    dist.barrier()
    for word in words:
        engine, _, name = word.partition(":")
        from accelerate.state import AcceleratorState, GradientState

        # accelerate leaves it after a run with DeepSpeed; the next one would have its engine as well, DDP or not.
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        AcceleratorState._reset_state()
        GradientState._reset_state()
        try:
            result = run(folder, engine, name)
        except ValueError as error:
            result = {"error": str(error)}
        if dist.get_rank() == 0:
            with (folder / "results.jsonl").open("a") as file:  # (on stdout the ranks write into each other)
                print(json.dumps({"run": word, **result}), file=file)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
