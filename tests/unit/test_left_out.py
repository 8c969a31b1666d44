"""What the trainer does with samples that could not be read: batches of what is left, steps without loss, a report."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from compat_modules import module_from
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from llava_packing_tower.data.images import UnreadableImage
from llava_packing_tower.integrations.llava import left_out
from llava_packing_tower.integrations.llava.left_out import FILE, IGNORE, NOTE, LeftOut
from llava_packing_tower.integrations.llava.native_dataset import FittingCollator
from llava_packing_tower.integrations.llava.patcher import Patches

pytestmark = pytest.mark.newest
TRAINER = """
from transformers import Trainer

class LLaVATrainer(Trainer):
    pass
"""
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=2, bos_token_id=1, model_max_length=8)
LOST = [LeftOut("a", "/data/a.png", "/data/a.png: No such file"), LeftOut("7", None, "damaged")]


def sample(seed: int) -> dict:
    ids = torch.randint(3, 20, (5,), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def host_collate(instances):
    ids, labels = (torch.stack([i[key] for i in instances]) for key in ("input_ids", "labels"))
    return {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(0)}


COLLATE = FittingCollator(host_collate, 8, -200, left_out.placeholder(TOKENIZER, None))


@pytest.fixture
def trainer_class(tmp_path, monkeypatch):
    module = module_from(tmp_path, monkeypatch, "lefthost.train.llava_trainer", TRAINER)
    patches = Patches()
    left_out.into_trainer(module, patches)
    yield module.LLaVATrainer
    patches.undo()


def trained(trainer_class, folder, samples, batch_size=2, compute_loss=None, **options) -> tuple[dict, object]:
    """The weights after one epoch of plain SGD over these samples, in their order."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).float()
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_steps=1,
        **options,
    )
    cls = trainer_class
    if compute_loss is not None:
        cls = type("Own", (trainer_class,), {"compute_loss": compute_loss})
    trainer = cls(model=model, args=args, train_dataset=samples, data_collator=COLLATE)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(samples)
    trainer.train()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, trainer


def own_loss(self, model, inputs, return_outputs=False, **kwargs):
    """A loss that somebody computes from logits, without a word to the Trainer's own."""
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("compute_loss", [None, own_loss], ids=["trainer", "own"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_nothing_changes_nothing(trainer_class, tmp_path, capsys, workers, compute_loss):
    good = [sample(seed) for seed in range(4)]
    options = {"compute_loss": compute_loss, "dataloader_num_workers": workers}
    with_gap = [*good[:2], LOST[0], LOST[1], good[2], good[3]]
    found, trainer = trained(trainer_class, tmp_path / "gap", with_gap, **options)
    assert trainer.state.global_step == 3
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] == 0 and losses[0] > 0 and losses[2] > 0
    assert "compute_loss" not in vars(trainer)
    wanted, _ = trained(trainer_class, tmp_path / "whole", good, **options)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    content = json.loads((tmp_path / "gap" / FILE).read_text())
    assert content == [
        {"sample": "7", "file": None, "reason": "damaged"},
        {"sample": "a", "file": "/data/a.png", "reason": "/data/a.png: No such file"},
    ]
    printed = capsys.readouterr().out
    assert "left out: 2 samples that cannot be read" in printed and "sample a: /data/a.png: No such file" in printed
    assert not (tmp_path / "whole" / FILE).exists()


def test_what_is_left_of_a_batch_is_averaged_as_the_host_averages(trainer_class, tmp_path):
    good = [sample(seed) for seed in range(3)]
    found, _ = trained(trainer_class, tmp_path / "gap", [good[0], LOST[0], good[1], good[2]])
    torch.manual_seed(0)
    batches = iter([COLLATE([good[0]]), COLLATE(good[1:])])
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    ).float()
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p, atol=1e-6), name


def test_accumulated_micro_batches_count_what_they_have(trainer_class, tmp_path):
    """Two micro-batches a step, of which one, or both, are empty: no gradient is NaN, and none counts twice."""
    good = [sample(seed) for seed in range(2)]
    accumulate = {"batch_size": 1, "gradient_accumulation_steps": 2}
    found, trainer = trained(trainer_class, tmp_path / "a", [good[0], LOST[0], LOST[1], LOST[0]], **accumulate)
    assert trainer.state.global_step == 2
    assert all(value.isfinite().all() for value in found.values())
    assert not all(
        torch.equal(found[name], value)
        for name, value in trained(trainer_class, tmp_path / "b", [LOST[0], LOST[1]], **accumulate)[0].items()
    )


def test_a_resumed_run_keeps_what_was_noted_and_a_new_one_does_not(tmp_path):
    file, trainer = tmp_path / FILE, SimpleNamespace()
    file.write_text(json.dumps([{"sample": "a", "file": "/a", "reason": "gone"}]))
    args = SimpleNamespace(output_dir=str(tmp_path))
    report = left_out.LeftOutReport(trainer)
    report.on_train_begin(args, SimpleNamespace(is_world_process_zero=True, global_step=4), None)
    report.records[("b", None, "cut")] = None
    report.on_save(args, SimpleNamespace(is_world_process_zero=True), None)
    assert [entry["sample"] for entry in json.loads(file.read_text())] == ["a", "b"]
    left_out.LeftOutReport(SimpleNamespace()).on_train_begin(
        args, SimpleNamespace(is_world_process_zero=True, global_step=0), None
    )
    assert not file.exists()


@pytest.mark.parametrize(("pad", "eos", "wanted"), [(0, 2, 2), (2, 2, 0), (None, 0, 1), (None, None, 1)])
def test_the_placeholder_is_no_padding(pad, eos, wanted):
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=eos, bos_token_id=None)
    made = left_out.placeholder(tokenizer, None)
    assert made["input_ids"].tolist() == [wanted] * 2 and made["labels"].tolist() == [IGNORE] * 2


def test_a_mark_and_a_refusal_survive_the_way_from_a_worker():
    assert pickle.loads(pickle.dumps(LOST[0])) == LOST[0]
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png is damaged", "a.png")))
    assert str(error) == "a.png is damaged" and error.file == "a.png"
    batch = COLLATE([LOST[0]])
    assert batch[NOTE] == {"samples": [["a", "/data/a.png", "/data/a.png: No such file"]], "empty": True}
