"""`llava-packing export`: exports say what the LLaVA that they come from says, in every mode, family and decoder."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import export_samples as samples
import llava_checkpoints
import pytest
import torch
from conftest import assert_close
from export_host_checks import CAN_LOAD, CASES, LONG_CASES, LONG_NEXT_CASES, NEXT_CASES
from host_runs import HOSTS, environment, execute
from llava_checkpoints import edit_config

from llava_packing_tower.checkpoint.weights import WeightFiles
from llava_packing_tower.cli.main import main
from llava_packing_tower.export.restore import restore
from llava_packing_tower.export.writer import export
from llava_packing_tower.integrations.llava.inference import load_checkpoint
from llava_packing_tower.utils.files import read_json, write_json

pytestmark = [
    pytest.mark.newest,
    pytest.mark.skipif(find_spec("llava") is None, reason="no LLaVA is installed"),
]
needs_hf = pytest.mark.skipif(not CAN_LOAD, reason="exports need transformers 4.57")
HELPERS = Path(__file__).parents[1] / "helpers"


def compare_in_host(folder: Path, next_dir: str, cases: int, *words: str) -> None:
    env = {**environment(next_dir), "PYTHONPATH": f"{HELPERS.parents[1]}"}
    command = [sys.executable, str(HELPERS / "export_host_checks.py"), str(folder), *words]
    result = execute(command, env, timeout=500)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
    assert len(list(folder.glob("case_*/model.safetensors"))) == cases
    assert result.stdout.count("compared") == (cases if CAN_LOAD else 0)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("next_dir", HOSTS)
def test_logits_and_answers_are_those_of_llava(tmp_path, next_dir):
    """Float32, 1e-5; one image, several, none, a video; each alone and all in one batch, token by token."""
    compare_in_host(tmp_path, next_dir, len(CASES) + (len(NEXT_CASES) if next_dir else 0))


@needs_hf
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("next_dir", HOSTS)
def test_the_other_families_in_three_modes(tmp_path, next_dir):
    compare_in_host(tmp_path, next_dir, len(LONG_CASES) + (len(LONG_NEXT_CASES) if next_dir else 0), "long")


# ---------------------------------------------------------------- one checkpoint for all that follows


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A LLaVA at native resolution whose videos are clips, its export, and the export in bfloat16."""
    from export_checks import make_checkpoint
    from export_host_checks import CLIP, MLP

    from llava_packing_tower.export.writer import export

    folder = tmp_path_factory.mktemp("exports of mine")
    checkpoint = make_checkpoint(folder, "llava_vit", "native", **CLIP, **MLP)
    write_json({"global_step": 3, "epoch": 1.5, "log_history": [{"loss": 4.0}]}, checkpoint / "trainer_state.json")
    write_json({}, checkpoint / "packing_finished.json")
    export(checkpoint, folder / "run1", max_shard_size="200KB")
    export(checkpoint, folder / "half", dtype="bfloat16")
    return folder, checkpoint


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = WeightFiles(folder)
    return {name: files[name] for name in files.shapes()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 50
    assert [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])] == []


def test_what_an_export_holds(work):
    folder, _ = work
    names = {path.name for path in (folder / "run1").iterdir()}
    assert {"config.json", "chat_template.jinja", "tokenizer.json", "preprocessor_config.json", "README.md"} <= names
    assert "model.safetensors.index.json" in names  # in shards, as asked
    text = "".join(p.read_text() for p in (folder / "run1").rglob("*") if p.suffix in (".json", ".md", ".jinja"))
    assert str(folder) not in text, "a published folder should not tell paths"
    # The default of the transformers that wrote it, which a newer one would take for the user's own limit.
    assert "max_length" not in read_json(folder / "run1" / "generation_config.json")
    card = (folder / "run1" / "README.md").read_text()
    assert "3 steps, 1.50 epochs" in card and "mlp2x_gelu" in card and "as clip" in card
    assert not list((folder / "run1").rglob("packing_finished.json"))


def test_back_to_llava_bit_by_bit(work, tmp_path):
    folder, checkpoint = work
    words = ["--output_dir", str(tmp_path / "again"), "--json", str(tmp_path / "made.json")]
    assert main(["import", str(folder / "run1"), *words]) == 0
    assert read_json(tmp_path / "made.json")["class_name"].startswith("Llava")
    original = tensors(checkpoint)
    same(tensors(tmp_path / "again"), original)
    restore(folder / "half", tmp_path / "half")
    same(tensors(tmp_path / "half"), {name: tensor.bfloat16() for name, tensor in original.items()})
    loaded = load_checkpoint(tmp_path / "again", "cpu")
    before, after = load_checkpoint(checkpoint, "cpu").model.config.to_dict(), loaded.model.config.to_dict()
    expected = {"mm_vision_tower", "unfreeze_mm_vision_tower", "_name_or_path"}
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} <= expected
    assert not {"export.json", "packing_finished.json"} & {path.name for path in (tmp_path / "again").iterdir()}


def test_a_lora_is_merged(work, tmp_path):
    from llava_checkpoints import make_llava, save_lora

    folder, _ = work
    decoder, tower = folder / "decoder_Llama0", folder / "llava_vit_packing"
    model = make_llava(decoder, tower, "Llama")
    model.config.mm_packing_conversation, model.config.image_aspect_ratio = "v1", "pad"
    _, merged = save_lora(model, decoder, tmp_path / "lora")
    edit_config(tmp_path / "lora", torch_dtype="float32", mm_packing_conversation="v1", image_aspect_ratio="pad")
    export(tmp_path / "lora", tmp_path / "out", base=decoder)
    restore(tmp_path / "out", tmp_path / "again")
    again = tensors(tmp_path / "again")
    for name, tensor in merged.items():
        assert torch.allclose(again[name], tensor, atol=1e-6), name
    assert "LoRA merged" in (tmp_path / "out" / "README.md").read_text()
    assert load_checkpoint(tmp_path / "again", "cpu").tokenizer is not None


REFUSED = [
    ({"mm_projector_type": "pooler"}, "mm_projector_type 'pooler'"),
    ({"mm_resampler_type": "spatial_pool"}, "a resampler"),
    ({"image_aspect_ratio": "highres"}, "image_aspect_ratio 'highres'"),
    ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": None}, "without image_grid_pinpoints"),
    ({"mm_patch_merge_type": "spatial_maxpool2x2"}, "mm_patch_merge_type"),
    ({"add_faster_video": True}, "add_faster_video"),
    ({"mm_vision_tower": "openai/clip", "mm_packing_config": None}, "no packing tower"),
    ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mm_vision_tower": None}, "is not a LLaVA"),
    ({"architectures": ["LlavaMptForCausalLM"]}, "MPT"),
    ({"mm_vision_tower": "packing:a + packing:b"}, "several vision towers"),
    ({"mm_projector_type": "checkpoint"}, "no mm_packing_projector, which says what it is"),
    (
        {
            "mm_projector_type": "patch_merger",
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [[16, 32]],
            "mm_patch_merge_type": "spatial_unpad",
        },
        "anyres tiles of a patch_merger",
    ),
    ({"use_pos_skipping": True}, "use_pos_skipping"),
    ({"architectures": ["LlavaQwen3ForCausalLM"]}, "LlavaQwen3ForCausalLM, a class that the LLaVA in"),
    ({"mm_packing_conversation": "v0"}, "messages of its own"),
    ({"mm_packing_conversation": "nonsense"}, "conversation template 'nonsense'"),
    ({"mm_packing_conversation": "mpt_no_such"}, "conversation template"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_what_cannot_be_exported_says_why_before_anything_is_written(work, tmp_path, changes, reason, capsys):
    _, checkpoint = work
    bad = tmp_path / "bad"
    shutil.copytree(checkpoint, bad)
    edit_config(bad, **changes)
    assert main(["export", str(bad), "--output_dir", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}


def without_tower(bad: Path) -> None:
    llava_checkpoints.edit(bad, lambda tensors: [tensors.pop(name) for name in list(tensors) if "vision_tower" in name])


def half_deleted(bad: Path) -> None:
    """In shards, of which one is gone."""
    from huggingface_hub import save_torch_state_dict

    weights = tensors(bad)
    (bad / "model.safetensors").unlink()
    save_torch_state_dict({n: t.clone() for n, t in weights.items()}, bad, max_shard_size="100KB")
    sorted(bad.glob("model-*.safetensors"))[1].unlink()


DAMAGED = [
    (half_deleted, "model-00002-of-"),
    (lambda bad: (bad / "config.json").unlink(), "has no config.json"),
    (lambda bad: (bad / "config.json").write_text("{"), "config.json"),
    (lambda bad: (bad / "model.safetensors").unlink(), "weights"),
    (lambda bad: (bad / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0"), "model.safetensors"),
    (without_tower, "should contain the weights of its vision tower"),
    (lambda bad: [file.unlink() for file in bad.glob("tokenizer*")], "LLaVA cannot load"),
    (lambda bad: edit_config(bad, mm_packing_min_patches=None), "mm_packing_min_patches"),
    (lambda bad: edit_config(bad, hidden_size=64), "LLaVA cannot load"),
    (lambda bad: edit_config(bad, num_attention_heads=0), "LLaVA cannot load"),
    (lambda bad: edit_config(bad, hidden_act="no such"), "LLaVA cannot load"),
    (lambda bad: edit_config(bad, torch_dtype="float7"), "torch_dtype is 'float7'; it is one of float32"),
    (lambda bad: edit_config(bad, model_type=[]), "config.json: model_type must be a text, got []"),
    (
        lambda bad: llava_checkpoints.edit(bad, lambda t: t["lm_head.weight"][1:2, 3].fill_(torch.nan)),
        "NaN or infinity in lm_head",
    ),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGED)
def test_a_damaged_checkpoint_says_what_is_wrong_before_anything_is_written(work, tmp_path, damage, reason, capsys):
    bad = tmp_path / "a bad one"
    shutil.copytree(work[1], bad)
    damage(bad)
    assert main(["export", str(bad), "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert reason in said and "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"a bad one"}


def test_other_hosts_are_refused_by_name(work, tmp_path, monkeypatch):
    from dataclasses import replace

    from llava_packing_tower.export import plan

    found = plan.find_host()
    other = replace(found, host=replace(found.host, name="bunny", title="Bunny"))
    monkeypatch.setattr(plan, "find_host", lambda: other)
    with pytest.raises(ValueError, match="the LLaVA here is Bunny: exports say what LLaVA-NeXT and"):
        export(work[1], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_output_folder_with_files_is_refused_and_nothing_is_half_written(work, tmp_path, monkeypatch):
    folder, checkpoint = work
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for output in (tmp_path / "full" / "x", tmp_path / "full" / "x" / "out"):
        for act in (
            lambda output=output: export(checkpoint, output),
            lambda output=output: restore(folder / "run1", output),
        ):
            with pytest.raises(ValueError, match="x exists and is not a folder"):
                act()
    with pytest.raises(ValueError, match="is not empty"):
        export(checkpoint, tmp_path / "full")
    with pytest.raises(ValueError, match="is not empty"):
        restore(folder / "run1", tmp_path / "full")
    import huggingface_hub

    def fails(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", fails)
    for act in (lambda: export(checkpoint, tmp_path / "out"), lambda: restore(folder / "run1", tmp_path / "out")):
        with pytest.raises(OSError, match="no space"):
            act()
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda t: t.pop(max(t)), "lacks 1 tensors of the export, for example "),
        (lambda t: t.update({max(t): torch.ones(2, 3)}), "1 tensors have other shapes than in the export"),
        (lambda t: t[max(t)].view(-1)[:1].fill_(torch.nan), "are damaged: NaN or infinity in "),
    ],
)
def test_a_damaged_export_is_not_turned_back(work, tmp_path, damage, reason):
    shutil.copytree(work[0] / "half", tmp_path / "bad")
    llava_checkpoints.edit(tmp_path / "bad", damage)
    with pytest.raises(ValueError, match=reason):
        restore(tmp_path / "bad", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}


def test_what_is_no_export_is_refused(work, tmp_path):
    folder, checkpoint = work
    with pytest.raises(ValueError, match="is not an export"):
        restore(checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match="is an export already"):
        export(folder / "run1", tmp_path / "out")
    shutil.copytree(folder / "half", tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "llava_checkpoint")
    with pytest.raises(ValueError, match="--origin"):
        restore(tmp_path / "saved", tmp_path / "out")
    restore(tmp_path / "saved", tmp_path / "out", origin=folder / "run1")
    same(tensors(tmp_path / "out"), {name: tensor.bfloat16() for name, tensor in tensors(checkpoint).items()})
    edit_config(tmp_path / "saved", mm_projector_type="linear")
    with pytest.raises(ValueError, match=r"was not trained on .* mm_projector_type"):
        restore(tmp_path / "saved", tmp_path / "out2", origin=folder / "run1")


def test_push_to_hub_uploads_the_folder(work, tmp_path, monkeypatch, capsys):
    import huggingface_hub
    from huggingface_hub import constants

    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append(name)

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, (Path(folder_path) / "config.json").is_file()))
            if repo_id == "me/full":
                raise RuntimeError("quota exceeded")
            return "there"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    words = ["export", str(work[1]), "--output_dir", str(tmp_path / "out"), "--push_to_hub"]
    # What cannot be uploaded is not exported either.
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for offline, name, reason in (
        (True, "me/run1", "OFFLINE"),
        (False, "me/run1", "no token"),
        (False, "a/b/c", "a/b/c"),
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert main([*words, name]) == 2 and reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and not calls
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    assert main([*words, "me/run1", "--json", str(tmp_path / "made.json")]) == 0
    assert read_json(tmp_path / "made.json")["uploaded_to"] == "there"
    assert calls == ["me/run1", ("me/run1", True)] and "uploaded to there" in capsys.readouterr().out
    words[3] = str(tmp_path / "two")
    assert main([*words, "me/full"]) == 2 and (tmp_path / "two" / "config.json").is_file()
    assert "is complete, but was not uploaded: quota exceeded" in capsys.readouterr().err


# ---------------------------------------------------------------- conversations


def conversations() -> list[str]:
    if find_spec("llava") is None:
        return []
    from llava.conversation import conv_templates

    import builder_patch  # noqa: F401

    return sorted(conv_templates)


@pytest.mark.parametrize("name", conversations())
def test_every_conversation_of_the_host_has_its_chat_template_or_is_refused(name):
    """Compared with ``get_prompt`` inside; what is refused says its style."""
    from llava_packing_tower.export.chat_template import Marks
    from llava_packing_tower.export.writer import proved_template

    for marks in (Marks(), Marks(gap=" "), Marks(start="<s>", end="</s>")):
        try:
            assert "{%" in proved_template(name, "<s>", marks)
        except ValueError as error:
            reasons = {"llava_llama_3": "separator style is LLAMA_3"}
            assert name in ("default", "v0", *reasons), error
            assert reasons.get(name, "it has messages of its own") in str(error)


# ---------------------------------------------------------------- in transformers


@pytest.fixture(scope="module")
def loaded(work):
    return samples.load(work[0] / "run1")


@needs_hf
def test_a_batch_with_beams_and_several_sequences(loaded):
    """Images and videos of a sample go with it: each sample alone has the same beams."""
    model, processor = loaded
    asked = samples.samples(videos=True)
    together = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
    batch = samples.answers(model, samples.inputs_of(processor, *asked), **together)
    alone = [
        row for sample in asked for row in samples.answers(model, samples.inputs_of(processor, sample), **together)
    ]
    assert batch == alone and len({tuple(row) for row in batch}) > 5


@needs_hf
def test_a_penalty_beside_images(loaded):
    """Their ids lie beyond the vocabulary. Without images it is transformers' own."""
    from transformers import RepetitionPenaltyLogitsProcessor

    from llava_packing_tower.hf.penalty import KnownTokensPenalty

    model, processor = loaded
    assert model.config.image_token_id >= model.vocab_size
    inputs = samples.inputs_of(processor, *samples.samples(True))
    penalized = samples.answers(model, inputs, repetition_penalty=50.0)
    assert all(len(set(row)) == len(row) for row in penalized) and penalized != samples.answers(model, inputs)
    ids, scores = torch.tensor([[3, 9, 9, 2], [12, 12, 12, 4]]), torch.randn(2, 10)
    other = RepetitionPenaltyLogitsProcessor(1.7)
    made = KnownTokensPenalty(1.7, 10)(ids, scores)
    assert torch.equal(made[:1], other(ids[:1], scores[:1])) and torch.equal(made[1:], other(ids[1:, 3:], scores[1:]))


@needs_hf
def test_evaluation_asks_an_export_as_it_asks_llava(work):
    from llava_packing_tower.eval import hf_inference
    from llava_packing_tower.integrations.llava import batched_inference

    folder, checkpoint = work
    ours, llava = hf_inference.load_checkpoint(folder / "run1", "cpu"), load_checkpoint(checkpoint, "cpu")
    for module, model in ((hf_inference, ours), (batched_inference, llava)):
        questions = [module.prepare(model, text, visuals, "v1", 4) for visuals, text in samples.samples(True)]
        scored = [module.prepare(model, "Which?", v, "v1", 4, "the moon") for v, _ in samples.samples(True)]
        answers = module.generate(model, questions, max_new_tokens=6, do_sample=False)
        losses = module.losses(model, scored)
        if module is hf_inference:
            first = answers, losses
    assert first[0] == answers
    for (loss, greedy), (other, other_greedy) in zip(first[1], losses):
        assert abs(loss - other) < 1e-4 and greedy == other_greedy
    with pytest.raises(ValueError, match="exported with the conversation v1"):
        hf_inference.conversation_name(folder / "run1", "plain")
    with pytest.raises(ValueError, match="has 1 <image>, but 2"):
        hf_inference.prepare(ours, "<image>?", samples.photographs((9, 9), (8, 8)), "v1")


@needs_hf
def test_attention_placement_and_compilation(work, loaded):
    model, processor = loaded
    inputs = samples.inputs_of(processor, samples.samples(True)[0])
    with torch.inference_mode():
        expected = model(**inputs).logits
        for options in ({"attn_implementation": "eager"}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}):
            other, _ = samples.load(work[0] / "run1", **options)
            assert_close(other(**inputs).logits, expected)
        assert samples.answers(model, inputs, cache_implementation="static") == samples.answers(model, inputs)


@needs_hf
def test_the_pipeline_and_saving(work, loaded, tmp_path):
    from transformers import pipeline

    model, processor = loaded
    visuals, question = samples.samples(True)[0]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"return_full_text": False, "generate_kwargs": {"do_sample": False, "max_new_tokens": 8}}
    answer = pipe(text=samples.messages_of(visuals, question), **options)
    wanted = samples.answers(model, samples.inputs_of(processor, (visuals, question)))
    assert answer[0]["generated_text"] == processor.decode(wanted[0], skip_special_tokens=True)
    assert len(pipe(text=samples.messages_of(visuals, question))) == 1  # with no limit of the user's
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, processor_again = samples.load(tmp_path / "saved")
    assert samples.answers(again, samples.inputs_of(processor_again, (visuals, question))) == wanted
    restore(tmp_path / "saved", tmp_path / "llava", origin=work[0] / "run1")
    same(tensors(tmp_path / "llava"), tensors(work[1]))


@needs_hf
def test_training_in_transformers_and_back_to_llava(work, tmp_path):
    """Trainer with a LoRA by PEFT; merged, saved, imported: LLaVA says what the trained model says."""
    from export_checks import llava_says
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    model, processor = samples.load(work[0] / "run1")
    asked = samples.samples(True)

    def collate(rows):
        inputs = samples.inputs_of(processor, *(asked[row["n"]] for row in rows))
        return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"], modules_to_save=["mm_projector"])
    adapted = get_peft_model(model, config)
    options = {"remove_unused_columns": False, "report_to": [], "use_cpu": True, "learning_rate": 1e-2, "max_steps": 3}
    args = TrainingArguments(str(tmp_path / "out"), per_device_train_batch_size=3, save_strategy="no", **options)
    trainer = Trainer(adapted, args, data_collator=collate, train_dataset=[{"n": n % 5} for n in range(9)])
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in adapted.named_parameters() if n in before and "lora_B" in n)
    merged = adapted.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "saved")
    restore(tmp_path / "saved", tmp_path / "llava", origin=work[0] / "run1")
    inputs = samples.inputs_of(processor, asked[0])
    with torch.inference_mode():
        logits = merged(**inputs).logits[0]
    said, _ = llava_says(load_checkpoint(tmp_path / "llava", "cpu"), *asked[0])
    assert_close(torch.from_numpy(said), logits)


@needs_hf
def test_what_does_not_fit_is_said(loaded):
    model, processor = loaded
    (image,), question = samples.samples(False)[0]
    with pytest.raises(ValueError, match="2 images, but the texts have"):
        processor(text="<image>?", images=[image, image])
    with pytest.raises(ValueError, match="no images, but"):
        processor(text="<image>?")
    with pytest.raises(TypeError, match="unexpected arguments sizes"):
        processor(text="<image>?", images=image, sizes=3)
    inputs = samples.inputs_of(processor, ([image], question))
    with pytest.raises(ValueError, match="places"):
        model(
            **{**inputs, "input_ids": inputs["input_ids"][:, :-30], "attention_mask": inputs["attention_mask"][:, :-30]}
        )
    labels = inputs["input_ids"]  # with the ids of images, which have no place in the vocabulary
    assert torch.isfinite(model(**inputs, labels=labels).loss)


# ---------------------------------------------------------------- with code

WITHOUT_US = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("llava_packing_tower", "llava", "triton"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
import torch
import export_samples as samples
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_grad_enabled(False)
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
print(samples.answers(model, samples.inputs_of(processor, *samples.samples(True))))
"""


@needs_hf
def test_with_its_code_an_export_needs_nothing_of_ours(work, loaded, tmp_path):
    _, checkpoint = work
    export(checkpoint, tmp_path / "run.1", with_code=True)
    assert "trust_remote_code=True" in (tmp_path / "run.1" / "README.md").read_text()
    env = {**environment(""), "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(HELPERS)}
    result = execute([sys.executable, "-c", WITHOUT_US, str(tmp_path / "run.1")], env)
    assert result.returncode == 0, result.stderr[-3000:]
    model, processor = loaded
    wanted = samples.answers(model, samples.inputs_of(processor, *samples.samples(True)))
    assert result.stdout.strip().splitlines()[-1] == str(wanted)
