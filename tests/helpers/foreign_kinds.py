"""Everything that may take the place of one of our modules, or change how it runs: see ``test_foreign_modules.py``.

Each kind is a function that changes a model in place and returns what undoes it. Those of ``LINEAR`` take a linear
layer by its parent and name, those of ``MODEL`` the whole model.
"""

import functools
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from llava_packing_tower.models.encoder import PackedEncoder
from llava_packing_tower.models.layers import MLP, EncoderBlock, LayerScale, PackedAttention

# ---------------------------------------------------------------- stand-ins


class Adapted(nn.Module):
    """A low-rank adapter around a layer (what LoRA is), for linear layers and convolutions."""

    def __init__(self, base):
        super().__init__()
        self.base, self.enabled = base, True
        self.in_features = getattr(base, "in_features", None)

    def forward(self, x):
        out = self.base(x)
        return out + 0.5 * out.roll(1, 0) if self.enabled else out


class Quantised(nn.Module):
    """A few levels and a scale per row, as bitsandbytes and quanto hold a linear layer."""

    def __init__(self, base):
        super().__init__()
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 3
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((base.weight / scale).round().to(torch.int8), requires_grad=False)
        self.bias = base.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Coarse(torch.Tensor):
    """A tensor that stands for other numbers, as torchao's are: its memory holds 16 times the value, rounded."""

    @staticmethod
    def of(weight):
        return (weight.detach() * 16).round().as_subclass(Coarse)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = [x.as_subclass(torch.Tensor) / 16 if isinstance(x, Coarse) else x for x in args]
        if function is nn.functional.linear:
            return function(*plain, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


# ---------------------------------------------------------------- one layer


def put(parent, name, new):
    old = getattr(parent, name)
    setattr(parent, name, new)
    return lambda: setattr(parent, name, old)


def adapter(parent, name):
    return put(parent, name, Adapted(getattr(parent, name)))


def quantised(parent, name):
    return put(parent, name, Quantised(getattr(parent, name)))


def tensor_subclass(parent, name):
    layer = getattr(parent, name)
    old = layer.weight
    layer.weight = nn.Parameter(Coarse.of(old), requires_grad=False)
    return lambda: setattr(layer, "weight", old)


def subclass(parent, name):
    layer = getattr(parent, name)
    new = Doubling(layer.in_features, layer.out_features, bias=layer.bias is not None).to(layer.weight)
    new.load_state_dict(layer.state_dict())
    return put(parent, name, new)


def another_class(parent, name):
    layer = getattr(parent, name)
    cls = type(layer)
    layer.__class__ = type("Other", (cls,), {"forward": lambda self, x: -cls.forward(self, x)})
    return lambda: setattr(layer, "__class__", cls)


def instance_forward(parent, name):
    layer = getattr(parent, name)
    layer.forward = types.MethodType(lambda self, x: 3 * type(self).forward(self, x), layer)
    return lambda: delattr(layer, "forward")


def forward_hook(parent, name):
    return getattr(parent, name).register_forward_hook(lambda module, inputs, out: out + 1).remove


def pre_hook(parent, name):
    return getattr(parent, name).register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)).remove


def hooks_in_a_new_dict(parent, name):
    layer = getattr(parent, name)
    layer._forward_hooks = type(layer._forward_hooks)()
    return forward_hook(parent, name)


def weight_norm(parent, name):
    layer = getattr(parent, name)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)
    layer.weight_g.data.mul_(2)

    def undo():
        layer.weight_g.data.mul_(0.5)
        nn.utils.remove_weight_norm(layer).requires_grad_(False)

    return undo


def parametrization(parent, name):
    layer = getattr(parent, name)
    parametrize.register_parametrization(layer, "weight", Twice(), unsafe=True)
    return lambda: parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def parametrized_weight_norm(parent, name):
    layer = getattr(parent, name)
    nn.utils.parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data.mul_(2)

    def undo():
        layer.parametrizations.weight.original0.data.mul_(0.5)
        weight = nn.Parameter(parametrize.remove_parametrizations(layer, "weight").weight, requires_grad=False)
        del layer.weight  # torch has made it a buffer
        layer.weight = weight

    return undo


def pruned(parent, name):
    layer = getattr(parent, name)
    old = layer.weight
    prune.random_unstructured(layer, "weight", 0.5)

    def undo():
        layer._forward_pre_hooks.clear()
        del layer.weight, layer.weight_orig, layer.weight_mask
        layer.weight = old

    return undo


LINEAR = [
    adapter, quantised, tensor_subclass, subclass, another_class, instance_forward, forward_hook, pre_hook,
    hooks_in_a_new_dict, weight_norm, parametrization, parametrized_weight_norm, pruned,
]  # fmt: skip
PLACES = ["self_attn.qkv", "self_attn.proj", "mlp.fc1", "mlp.fc2"]

# ---------------------------------------------------------------- whole models


def block(model):
    return model.encoder.layers[1]


def other_eps(model):
    norm = block(model).layer_norm2
    old, norm.eps = norm.eps, 0.5
    return lambda: setattr(norm, "eps", old)


def other_activation(model):
    return put(block(model).mlp, "act", nn.ReLU())


def activation_forward(model):
    act = block(model).mlp.act
    act.forward = torch.relu
    return lambda: delattr(act, "forward")


def no_norm(model):
    return put(block(model), "layer_norm1", nn.Identity())


def norm_without_weights(model):
    norm = block(model).layer_norm1
    return put(block(model), "layer_norm1", nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False))


def another_scale(model):
    return put(block(model), "layer_scale2", Twice())


def an_added_scale(model):
    scale = LayerScale(model.config.hidden_size, 0.3).to(block(model).mlp.fc1.weight)
    return put(block(model), "layer_scale1", scale)


def other_rotation(model):
    attention = block(model).self_attn
    old = attention.rotate
    attention.rotate = torch.neg
    return lambda: setattr(attention, "rotate", old)


def block_forward(model):
    layer = block(model)
    own = layer.forward
    layer.forward = lambda x, pending, *rest: own(2 * x, pending, *rest)
    return lambda: delattr(layer, "forward")


def wrapped_block(model):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, pending, segments, rotary, backend):
            return self.inner(-x, pending, segments, rotary, backend)

    layers = model.encoder.layers
    old = layers[1]
    layers[1] = Wrapper(old)
    return lambda: layers.__setitem__(1, old)


def class_forward(cls, model):
    own = cls.forward

    @functools.wraps(own)
    def forward(self, x, *rest, **more):
        return own(self, -x, *rest, **more)

    cls.forward = forward
    return lambda: setattr(cls, "forward", own)


def global_hook(model):
    def hook(module, inputs, out):
        return 2 * out if isinstance(module, nn.Linear) else None

    return nn.modules.module.register_module_forward_hook(hook).remove


def encoder_hook(model):
    return model.encoder.register_forward_hook(lambda module, inputs, out: tuple(2 * x for x in out)).remove


def block_hook(model):
    def hook(module, inputs, out):
        total, pending = out
        return 2 * total, None if pending is None else 2 * pending

    return block(model).register_forward_hook(hook).remove


def model_forward(model):
    own = model.forward
    model.forward = lambda *args, **kwargs: tuple(2 * x for x in own(*args, **kwargs))
    return lambda: delattr(model, "forward")


def patch_projection(model):
    embed = model.patch_embed
    return put(embed, "proj", Adapted(embed.proj))


def patch_projection_hook(model):
    return model.patch_embed.proj.register_forward_hook(lambda module, inputs, out: out.roll(1, 1)).remove


def outer_norm(model):
    return put(model, "layernorm_pre", Adapted(model.layernorm_pre))


def adapter_switched_later(model):
    """Put in, run, switched off, run, on again: the switch changes no weight, class or hook."""
    mlp = block(model).mlp
    undo = adapter(mlp, "fc1")
    mlp.fc1.enabled = False
    model._run()
    mlp.fc1.enabled = True
    return undo


def two_dtypes(model):
    """Norms in another precision than the products, as peft prepares quantised models."""
    norm = block(model).layer_norm1
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.float()
    hooks = [
        norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),)),
        norm.register_forward_hook(lambda module, inputs, out: out.to(model.dtype)),
    ]
    return lambda: ([hook.remove() for hook in hooks], norm.double().load_state_dict(state))


def offloaded(model):
    """Every weight on the meta device until its module is called."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    state = {name: value.clone() for name, value in model.state_dict().items()}
    cpu_offload(model, execution_device=torch.device("cpu"))

    def undo():
        remove_hook_from_module(model, recurse=True)
        model.load_state_dict(state, assign=True)

    return undo


def peft(model, method="LoraConfig", **options):
    """A real adapter, unmerged, with weights that are not zero."""
    library = pytest.importorskip("peft")
    targets = options.pop("target_modules", ["fc1", "qkv", "proj"])
    config = getattr(library, method)(target_modules=targets, **options)
    attributes = vars(model).copy()
    tuned = library.inject_adapter_in_model(config, model)
    for name, parameter in tuned.named_parameters():
        if "lora" in name or "ia3" in name:
            nn.init.normal_(parameter, std=0.5)
            parameter.data = parameter.data.to(model.dtype)
    from peft.tuners.tuners_utils import BaseTunerLayer

    def undo():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, BaseTunerLayer):
                    setattr(parent, name, child.get_base_layer())
        for name in set(vars(model)) - set(attributes):
            delattr(model, name)

    return undo


def merged(model):
    """Adapters that were merged into the weights, in place, and are still there."""
    undo = peft(model, r=2)
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    model._run()
    for layer in layers:
        layer.merge()
    return lambda: ([layer.unmerge() for layer in layers], undo())


NEUTRAL = {"offloaded", "two_dtypes"}  # kinds that change how, and not what, is computed
MODEL = [
    other_eps, other_activation, activation_forward, no_norm, norm_without_weights, another_scale, an_added_scale,
    other_rotation, block_forward, wrapped_block, global_hook, encoder_hook, block_hook, model_forward,
    patch_projection, patch_projection_hook, outer_norm, adapter_switched_later, two_dtypes, offloaded, merged,
]  # fmt: skip
MODEL = {kind.__name__: kind for kind in MODEL}
for _cls in (EncoderBlock, PackedAttention, MLP, nn.Linear, nn.LayerNorm, PackedEncoder):
    MODEL[f"{_cls.__name__}.forward"] = functools.partial(class_forward, _cls)
MODEL["peft LoRA"] = functools.partial(peft, r=2)
MODEL["peft DoRA"] = functools.partial(peft, r=2, use_dora=True, target_modules=["fc1"])
MODEL["peft IA3"] = functools.partial(
    peft, method="IA3Config", target_modules=["fc1", "fc2"], feedforward_modules=["fc2"]
)
# What the blocks may be fused with nevertheless: it lies outside of them, or DeepSpeed and FSDP do so.
OUTSIDE = {
    "encoder_hook", "block_hook", "model_forward", "patch_projection", "patch_projection_hook", "outer_norm",
    "PackedEncoder.forward",
}  # fmt: skip
# Not as the blocks were made, but torch's own or ours: what calls them may be recorded anew.
CALLABLE = {
    "other_eps", "other_activation", "no_norm", "norm_without_weights", "an_added_scale", "other_rotation",
}  # fmt: skip
