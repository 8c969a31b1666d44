"""Foreign modules on a GPU, where blocks are fused and replayed by default: real adapters, offload, quantised layers.

``tests/test_foreign_modules.py`` has all kinds, on a CPU; here they meet the real kernels and graphs.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from foreign_kinds import LINEAR, MODEL, NEUTRAL, peft

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from llava_packing_tower import HEVCViTPackingVisionTower
from llava_packing_tower.models.layers import NORMS
from llava_packing_tower.models.registry import family_for
from llava_packing_tower.tools.bench.models import PRESETS

pytestmark = pytest.mark.gpu
GAIN = 2.5
SIZES = ((9, 12), (3, 5), (14, 2))


def tower(family="llava_vit", **more):
    """A tower in bf16 around a model with random weights, and images for it."""
    torch.manual_seed(0)
    preset = PRESETS[family]
    cls = family_for(preset.model_type)
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4, **more}
    model = cls(cls.config_class(**{**preset.tiny, **sizes})).eval().requires_grad_(False)
    for module in model.encoder.modules():  # else a block does so little that one left out is lost in bfloat16
        if isinstance(module, torch.nn.Linear):
            module.weight.mul_(GAIN)
        elif type(module) in NORMS.values():  # they begin as ones, which norms without weights have too
            module.weight.uniform_(0.5, 1.5)
    saved = {"weights": "checkpoint", "config": model.config.to_dict()}
    saved["image_processor"] = model.default_image_processor(model.config).to_dict()
    vision = HEVCViTPackingVisionTower("x", SimpleNamespace(mm_vision_select_layer=-1, mm_packing_config=saved)).eval()
    vision.vision_tower, vision._unfilled = model.to("cuda", torch.bfloat16), False
    patch = model.config.patch_size
    images = [torch.randn(3, h * patch, w * patch, device="cuda") for h, w in SIZES]

    def run():
        with torch.no_grad():
            return torch.cat(vision(images)).float()

    object.__setattr__(model, "_run", run)
    return vision, images, run


def agree(vision, run):
    """Features of the default path, five times (plain, graph, from pixels on), are those of the plain blocks."""
    encoder = vision.vision_tower.encoder
    encoder.fused = False
    want = run()
    encoder.fused = None
    for number in range(5):
        got = run()
        assert (got - want).abs().max() <= 0.03 * want.abs().max(), number
    return want


def check(change, neutral=False, **more):
    vision, _, run = tower(**more)
    before = agree(vision, run)
    assert vision.vision_tower.encoder.last_plan.path == "fused"
    undo = change(vision.vision_tower)
    changed = agree(vision, run)
    assert neutral or (changed - before).abs().max() > 0.05 * before.abs().max(), "a kind without effect"
    undo()
    agree(vision, run)


@pytest.mark.parametrize("place", ["self_attn.proj", "mlp.fc1"])
@pytest.mark.parametrize("kind", LINEAR, ids=lambda kind: kind.__name__)
def test_a_foreign_layer_is_called(kind, place):
    owner, _, name = place.partition(".")
    check(lambda model: kind(getattr(model.encoder.layers[1], owner), name))


@pytest.mark.parametrize("name", [name for name in MODEL if name not in ("offloaded", "two_dtypes")])
def test_a_foreign_part_of_the_model_is_called(name):
    check(MODEL[name], name in NEUTRAL)


@pytest.mark.parametrize("family", list(PRESETS))
def test_a_real_adapter_is_not_ignored(family):
    """PEFT, unmerged, on ``fc1`` and ``proj`` (which is a convolution's name as well): switched off and on again."""
    library = pytest.importorskip("peft")
    vision, _, run = tower(family)
    before = agree(vision, run)
    peft(vision.vision_tower, r=4, target_modules=["fc1", "proj"])
    with_adapters = agree(vision, run)
    assert (with_adapters - before).abs().max() > 0.05 * before.abs().max()
    layers = [m for m in vision.modules() if isinstance(m, library.tuners.tuners_utils.BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    assert (agree(vision, run) - before).abs().max() <= 0.03 * before.abs().max()
    for layer in layers:
        layer.enable_adapters(True)
    assert (agree(vision, run) - with_adapters).abs().max() <= 0.03 * with_adapters.abs().max()


@pytest.mark.parametrize("images_on", ["cpu", "cuda"])
@pytest.mark.parametrize("family", list(PRESETS))
def test_weights_offloaded_by_accelerate(family, images_on):
    accelerate = pytest.importorskip("accelerate")
    vision, images, run = tower(family)
    want = agree(vision, run)
    accelerate.cpu_offload(vision.vision_tower, execution_device=torch.device("cuda", 0))
    assert vision.device == torch.device("cuda", 0)
    for _ in range(4):
        with torch.no_grad():
            got = torch.cat(vision([x.to(images_on) for x in images])).float()
        assert (got - want).abs().max() <= 0.03 * want.abs().max()
    torch.cuda.synchronize()  # the context is whole


def test_a_part_left_on_the_host_is_an_error_and_no_broken_context():
    vision, _, run = tower()
    run()
    vision.vision_tower.encoder.layers[2].mlp.to("cpu")
    with pytest.raises(RuntimeError, match="device"):
        run()
    vision.vision_tower.to("cuda")
    assert run().isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", list(PRESETS))
def test_blocks_on_two_devices(family):
    accelerate = pytest.importorskip("accelerate")
    vision, _, run = tower(family)
    want = agree(vision, run)
    model = vision.vision_tower
    names = {name for name, _ in model.named_children() if name != "encoder"}
    devices = {**dict.fromkeys(names, 0), **{f"encoder.layers.{i}": i // 2 for i in range(4)}}
    accelerate.dispatch_model(model, device_map=devices)
    got = run()
    assert (got - want).abs().max() <= 0.03 * want.abs().max()


def test_bitsandbytes_layers():
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantise(model):
        for layer in model.encoder.layers:
            old = layer.mlp.fc1
            new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
            new.load_state_dict(old.state_dict())
            layer.mlp.fc1 = new.cuda()
        return lambda: None

    check(quantise, neutral=True)


def test_torchao_layers():
    quantization = pytest.importorskip("torchao.quantization")

    def quantise(model):
        state = copy.deepcopy(model.state_dict())
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return lambda: model.load_state_dict(state, assign=True)

    check(quantise, neutral=True)


def test_two_threads_on_two_streams():
    """Graphs have one place each for what goes in and comes out: threads take turns."""
    import threading

    vision, _, _ = tower()
    patch = vision.config.patch_size
    batches = [[torch.randn(3, h * patch, w * patch, device="cuda") for h, w in ((7, 9), (4, 4))] for _ in range(8)]
    with torch.no_grad():
        want = [torch.cat(vision(batch)) for batch in batches]
        for _ in range(4):
            vision(batches[0])
    torch.cuda.synchronize()
    wrong = []

    def work(offset):
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            for step in range(60):
                index = (step + offset) % len(batches)
                got = torch.cat(vision(batches[index]))
                if (got.float() - want[index].float()).abs().max() > 0.03 * want[index].float().abs().max():
                    wrong.append((offset, step))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
