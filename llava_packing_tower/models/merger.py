"""The projector that a VLM has behind its vision tower: of what kind it is, and from which tensors it is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..checkpoint.weights import Recipe


@dataclass(frozen=True)
class Merger:
    """A norm of each patch, concatenation of the patches of a cell (row by row), linear, GELU, linear.

    merge: rows and columns of a cell. vision_size, inner_size, text_size: widths of a patch, of what is between the two
    layers, and of the output. norm: "layer_norm" or "rms_norm", with this eps. input_norm_eps: of a LayerNorm in front
    of all that, which is the final one of the tower; None for none.
    """

    merge: tuple[int, int]
    vision_size: int
    inner_size: int
    text_size: int
    norm: str = "layer_norm"
    norm_eps: float = 1e-6
    input_norm_eps: float | None = None

    def to_dict(self) -> dict:
        """For a config.json (JSON types only)."""
        return {**asdict(self), "merge": list(self.merge)}

    @classmethod
    def from_dict(cls, content: dict) -> Merger:
        return cls(**{**content, "merge": tuple(content["merge"])})


@dataclass(frozen=True)
class MergerSource:
    """A merger, and the recipes of its tensors: ``ln_q.*``, ``mlp.0.*`` and ``mlp.2.*``."""

    merger: Merger
    recipes: dict[str, Recipe]


NAMES = ("ln_q.weight", "ln_q.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")


def merger_recipes(*layers: str, norm_bias: bool = True) -> dict[str, Recipe]:
    """Recipes from the names in a checkpoint of the norm and the two linear layers, each with a weight and a bias."""
    sources = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    recipes = {name: Recipe((source,)) for name, source in zip(NAMES, sources, strict=True)}
    if not norm_bias:
        del recipes["ln_q.bias"]
    return recipes
