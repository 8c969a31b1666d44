"""SigLIP2, AIMv2 and DINOv3 against the golden tensors of transformers' models, and what all of them promise."""

import pytest
import torch
from conftest import assert_close
from families import ALL_FAMILIES, GOLDEN_FAMILIES, pack, per_image, ragged
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llava_packing_tower import AIMv2Packing, DINOv3ViTPacking, Siglip2NaflexPacking
from llava_packing_tower.attention.dispatch import backend_module, resolve_backend
from llava_packing_tower.data.patches import split_packed
from llava_packing_tower.data.segments import LayerSegments
from llava_packing_tower.models import aimv2, dinov3, layers, siglip2
from llava_packing_tower.models.base import PackedVisionModel
from llava_packing_tower.models.encoder import PackedEncoder
from llava_packing_tower.models.registry import family_for

pytestmark = pytest.mark.newest
NAMES = list(GOLDEN_FAMILIES)
ALL = list(ALL_FAMILIES)


@pytest.fixture
def load(golden):
    return lambda name, **options: ALL_FAMILIES[name].from_pretrained(golden / name, **options)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_golden(load, golden_case, name, backend):
    expected = golden_case(name, "images")
    model = load(name, attn_implementation=backend)
    images = [expected[f"pixels.{i}"] for i in range(len(expected["grid_thw"]))]
    rows, grid = pack(model, images)
    assert torch.equal(rows, expected["patches"]) and torch.equal(grid, expected["grid_thw"])
    last, states = model(rows, grid, output_hidden_states=True)
    assert_close(last, expected["last_hidden_state"])
    assert_close(torch.stack(states), expected["hidden_states"])
    assert torch.equal(model(rows, grid), last)
    picked = model(rows, grid, feature_layers=(2, 0))
    assert torch.equal(picked[0], states[2]) and torch.equal(picked[1], states[0])


# ---------------------------------------------------------------- packing


def loss_gradients(model, images, weights):
    model.zero_grad()
    sum((out * w).sum() for out, w in zip(per_image(model, images), weights)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ALL)
def test_alone_equals_packed_forward_and_gradient(load, name):
    model = load(name)
    images = ragged(model)
    packed = per_image(model, images)
    weights = [torch.randn_like(out) for out in packed]
    for image, out in zip(images, packed):
        assert_close(per_image(model, [image])[0], out, atol=1e-5)
    together = loss_gradients(model, images, weights)
    alone = [loss_gradients(model, [image], [w]) for image, w in zip(images, weights)]
    for key, gradient in together.items():
        summed = sum(g[key] for g in alone)
        assert gradient.abs().max() > 0, f"{key} takes no part"
        assert (gradient - summed).norm() <= 1e-5 * summed.norm(), key


@pytest.mark.parametrize("name", ALL)
def test_permuted_images_permute_the_outputs(load, name):
    model = load(name)
    images, order = ragged(model), [2, 0, 4, 1, 3]
    order = [i for i in order if i < len(images)]
    out = per_image(model, images)
    for place, permuted in zip(order, per_image(model, [images[i] for i in order])):
        assert_close(permuted, out[place], atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_train_and_checkpointing_change_nothing(load, name):
    model = load(name)
    images = ragged(model)
    weights = [torch.randn_like(out) for out in per_image(model, images)]
    expected = loss_gradients(model, images, weights)
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(per_image(model, images), per_image(model.eval(), images)))
    model.train().gradient_checkpointing_enable()
    assert model.encoder.gradient_checkpointing
    for key, gradient in loss_gradients(model, images, weights).items():
        assert_close(gradient, expected[key], atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_training_after_inference_mode(load, name):
    """LLaVA generates under inference_mode: index tables kept from there must serve a training step."""
    model = load(name)
    images = ragged(model, ((2, 9), (9, 2), (2, 9)))
    with torch.inference_mode():
        expected = per_image(model, images)
    outputs = per_image(model, images)
    sum(out.sum() for out in outputs).backward()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected))


@pytest.mark.parametrize("name", ALL)
def test_no_buffers_and_exact_positions_in_bfloat16(load, name):
    """Nothing that a cast could round: the bf16 error stays that of bf16 weights, also at far positions."""
    model = load(name)
    assert not list(model.buffers())
    images = ragged(model, ((1, 40), (37, 2)))
    # The golden weights are large; shrunk ones make the positions, not the softmax, decide.
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(0.25)
    low = per_image(model.to(torch.bfloat16), [x.bfloat16() for x in images])
    exact = per_image(model.float(), [x.bfloat16().float() for x in images])
    for a, b in zip(low, exact):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() < 0.02 * b.norm()


def test_positions_are_resized_once_per_length_of_a_side(load, monkeypatch):
    calls = []
    interpolate = F.interpolate
    monkeypatch.setattr(siglip2.F, "interpolate", lambda *a, **k: (calls.append(k["size"][0]), interpolate(*a, **k))[1])
    model = load("siglip2")
    siglip2.axis_weights.cache_clear()
    for _ in range(2):
        model(*pack(model, ragged(model)))  # 3 x 5, 1 x 7, 5 x 3, 4 x 4
        assert calls == [3, 5, 1, 7, 4]


@pytest.mark.parametrize("grid", [(1, 1), (2, 16), (16, 16), (5, 3), (40, 23)])
def test_resized_positions_are_those_of_interpolate(grid):
    """Value and gradient, in float64 as far as interpolate has it: larger and smaller than the table, both at once."""
    positions = siglip2.ResizedPositions(256, 6)
    torch.nn.init.normal_(positions.weight)
    h, w = grid
    upstream = torch.randn(h * w, 6)
    got = positions(torch.zeros(h * w, 6), [(1, h, w)])
    table = positions.weight.unflatten(0, (16, 16)).permute(2, 0, 1).unsqueeze(0)
    want = F.interpolate(table, size=grid, mode="bilinear", align_corners=False, antialias=True)[0].flatten(1).t()
    assert_close(got, want, atol=1e-5)
    grads = [torch.autograd.grad(x, positions.weight, upstream)[0] for x in (got, want)]
    assert_close(*grads, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_in_half_precision_are_rounded_once(dtype):
    """Tokens plus position as in float32, then rounded: shares of one half-precision number each would not do that."""
    positions = siglip2.ResizedPositions(256, 64)
    torch.nn.init.normal_(positions.weight, mean=2.0)
    positions.to(dtype)
    grids, tokens = [(1, 23, 9), (1, 4, 40)], torch.randn(23 * 9 + 160, 64).to(dtype)
    got = positions(tokens, grids)
    exact = positions.float()(tokens.float(), grids)
    rounding = torch.finfo(dtype).eps / 2
    assert ((got.float() - exact).abs() <= 1.1 * rounding * exact.abs() + 1e-5).all()


class Operations(TorchDispatchMode):
    """Counts the tensor operations that are carried out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ALL)
def test_one_pass_whatever_the_number_of_images(load, monkeypatch, name):
    """The blocks see the whole ragged batch, prefix tokens inside each image's segment, and carry out the same number
    of operations for 60 images as for 3."""
    model = load(name)
    prefix = len(model.prefix.weight) if hasattr(model, "prefix") else 0
    monkeypatch.setattr(layers, "attend", lambda q, k, v, segments, backend: v)  # CPU backends go by lengths
    seen, counts = [], []

    def encoder(run):
        def counted(tokens, segments, rotary, keep):
            seen.append((tokens.shape[0], segments))
            with Operations() as inside:
                out = run(tokens, segments, rotary, keep)
            counts.append(inside.count)
            return out

        return counted

    monkeypatch.setattr(model.encoder, "forward", encoder(model.encoder.forward))
    for copies in (1, 20):
        images = ragged(model, ((3, 5), (1, 7), (3, 5))) * copies
        rows, grid = pack(model, images)
        with torch.no_grad():
            model(rows, grid)
        tokens, segments = seen[-1]
        assert tokens == len(rows) + prefix * len(grid) and len(grid) == 3 * copies
        kinds = segments.kinds if isinstance(segments, LayerSegments) else (segments,)
        assert kinds[-1].lengths == tuple(int(h * w) + prefix for _, h, w in grid)
    assert len(seen) == 2 and counts[0] == counts[1] > 5 * model.num_layers


@pytest.mark.parametrize(("name", "module"), [("aimv2_native", aimv2), ("dinov3", dinov3), ("siglip2", siglip2)])
def test_positions_are_made_once_per_batch(load, monkeypatch, name, module):
    model, made = load(name), []
    function = "positions_and_sizes" if name == "dinov3" else "positions_of_grids"
    real = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *arguments: made.append(1) or real(*arguments))
    model(*pack(model, ragged(model, ((2, 11), (11, 2), (2, 11), (13, 1)))))
    assert len(made) == 1


def test_one_encoder_core(golden):
    """Whatever stands between embedding and final norm is the same code in all families."""
    models = [cls.from_pretrained(golden / name) for name, cls in ALL_FAMILIES.items()]
    models.append(family_for("llava_vit").from_pretrained(golden / "llava_vit"))
    for model in models:
        assert type(model).forward is PackedVisionModel.forward or model.config.model_type == "llava_vit_packing"
        assert type(model).encode is PackedVisionModel.encode and type(model.encoder) is PackedEncoder
        ours = {type(m).__module__ for m in model.encoder.modules() if type(m).__module__.startswith("llava_packing")}
        assert ours <= {
            f"llava_packing_tower.{name}" for name in ("models.encoder", "models.layers", "models.activations")
        }


def test_rope_augmentation_only_if_asked_for(golden, monkeypatch):
    config = DINOv3ViTPacking.config_class.from_dict(
        {
            **DINOv3ViTPacking.from_pretrained(golden / "dinov3").config.to_dict(),
            "rope_augmentation": True,
            "pos_embed_shift": 0.1,
            "pos_embed_jitter": 1.2,
        }
    )
    model = DINOv3ViTPacking.from_pretrained(golden / "dinov3", config=config)
    plain = DINOv3ViTPacking.from_pretrained(golden / "dinov3")
    images = ragged(model)
    assert all(torch.equal(a, b) for a, b in zip(per_image(model, images), per_image(plain, images)))

    def augmented(seed):
        torch.manual_seed(seed)
        return torch.cat(per_image(model, images))

    model.train()
    first = augmented(0)
    assert torch.equal(first, augmented(0)) and (first - augmented(1)).abs().max() > 1e-3
    torch.manual_seed(0)
    tables, rotary = [], dinov3.rotary_2d
    monkeypatch.setattr(dinov3, "rotary_2d", lambda table, *a: (tables.append(table), rotary(table, *a))[1])
    model(*pack(model, ragged(model, ((3, 5), (3, 5)))))
    table = tables[0]
    assert (table[:5] == 0).all() and (table[20:25] == 0).all()  # CLS and registers stay where they are
    assert not torch.allclose(table[5:20], table[25:])  # each image has its own draw
    # One factor and one offset per axis explain all of it.
    before = dinov3.patch_centres([(1, 3, 5)], torch.device("cpu"))
    for axis in range(2):
        design = torch.stack([before[:, axis], torch.ones(15)], dim=1)
        fit = torch.linalg.lstsq(design, table[5:20, axis : axis + 1]).solution
        assert_close(design @ fit, table[5:20, axis : axis + 1], atol=1e-5)
        assert 1 / 2.4 <= fit[0] <= 2.4 and abs(fit[1]) <= 0.1 * 2.4


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("name", NAMES)
def test_videos_are_refused(load, name):
    model = load(name)
    rows = torch.randn(2 * 16, model.patch_dim)
    with pytest.raises(ValueError, match=r"images only \(t = 1\), got a sample with t = 2"):
        model(rows, torch.tensor([[2, 4, 4]]))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_row_width_names_the_layout(load, name):
    model = load(name)
    with pytest.raises(ValueError, match=r"\[N, 48\].*channel_last order \(ph pw c\).*\[16, 49\]"):
        model(torch.randn(16, 49), torch.tensor([[1, 4, 4]]))
    with pytest.raises(ValueError, match=r"15 patches.*16 rows"):
        model(torch.randn(16, 48), torch.tensor([[1, 3, 5]]))


@pytest.mark.parametrize("grid", [(3, 5), (2, 8), (5, 5)])
def test_learned_positions_take_one_grid(load, grid):
    """Also (2, 8), which has as many patches as the table has rows: transformers would take it, and mix up rows."""
    h, w = grid
    rows = torch.randn(16 + h * w, 48)
    with pytest.raises(ValueError, match=rf"image 1 has {h} x {w} patches.*4 x 4 only"):
        load("aimv2_learned")(rows, torch.tensor([[1, 4, 4], [1, h, w]]))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Siglip2NaflexPacking, {"num_patches": 40}, "square number.*40"),
        (Siglip2NaflexPacking, {"hidden_size": 50}, "50 is not a multiple of 12 heads"),
        (AIMv2Packing, {"hidden_size": 30, "num_attention_heads": 3, "is_native": True}, "divisible by 4, got 30"),
        (DINOv3ViTPacking, {"hidden_size": 60, "num_attention_heads": 6}, "head width 10; .* multiple of 4"),
        (DINOv3ViTPacking, {"drop_path_rate": 1}, "drop_path_rate must be a probability .*got 1"),
        (Siglip2NaflexPacking, {"attention_dropout": -0.1}, "attention_dropout must be a probability .*got -0.1"),
        (AIMv2Packing, {"patch_size": [14, 16]}, r"patch_size must be one number .*\[14, 16\]"),
        (AIMv2Packing, {"hidden_act": "swush"}, "unknown activation 'swush'"),
    ],
)
def test_configs_that_cannot_work(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(cls.config_class(num_hidden_layers=1, **options))


@pytest.mark.parametrize("backend", ["flash_attention_2", "torch_varlen"])
def test_head_widths_that_a_backend_cannot_do(backend):
    """DINOv3 allows multiples of 4, the kernels want multiples of 8: the reason is given before anything runs."""
    reason = backend_module(backend).unsupported_reason(torch.device("cuda"), torch.bfloat16, 12)
    assert reason == "head width must be a multiple of 8 and at most 256"
    with pytest.raises((ValueError, ImportError), match=f"{backend}'.*(head width 12|needs)"):
        resolve_backend(backend, "cuda", torch.bfloat16, 12)


def test_split_back_in_the_order_of_the_images(load):
    model = load("siglip2")
    images = ragged(model)
    rows, grid = pack(model, images)
    parts = split_packed(model(rows, grid), [tuple(g) for g in grid.tolist()])
    assert [len(part) for part in parts] == [15, 7, 15, 16, 15]
