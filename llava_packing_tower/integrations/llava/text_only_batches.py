"""No rank waits for another: the tower and the projector run in every step, on every rank, and embeddings once.

ZeRO and DDP run collectives for each module and each gradient. A rank whose batch has no image would leave out those of
the tower, and the others would wait for it for ever. LLaVA looks up the embeddings of each sample by themselves: under
ZeRO-3 that is a gather for each sample, and ranks may have different numbers of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType

import torch

from ...checkpoint.weights import zero3_enabled
from ...data.segments import to_device
from .host import PREPARE
from .methods import Call, add_step
from .patcher import Patches
from .registry import host_of, mixin
from .trainable_parts import is_packing_tower
from .words_on_host import are_moved, device_before


def takes_part(model: torch.nn.Module) -> bool:
    """Whether other ranks may be waiting: while training, and under ZeRO-3 in evaluation too."""
    return (model.training and torch.is_grad_enabled()) or zero3_enabled()


def blank_images(tower: torch.nn.Module, count: int) -> torch.Tensor:
    """``count`` small images ``[count, C, 2p, 2p]`` of zeros (two patches a side, which every projector can merge)."""
    side = 2 * tower.config.patch_size
    return torch.zeros(count, tower.config.num_channels, side, side, device=tower.device, dtype=tower.dtype)


def run_on_blanks(arch: ModuleType, patches: Patches) -> None:
    """Have a batch without images encode blank images, one per sample, as LLaVA's own data does for text-only samples.

    LLaVA joins an empty slice of the features of such a sample to its text, so that all weights get gradients of zeros.
    The same is done for ``image_newline``, which LLaVA does not use in a batch of text alone. In a step, ``ValueError``
    for a text with ``<image>`` but no images.
    """
    owner = mixin(arch)
    takes = list(inspect.signature(getattr(owner, PREPARE)).parameters)[1:]
    embeds = takes.index("past_key_values") + 1  # it returns what it takes, with the embeddings behind that

    def run_blanks(call: Call) -> Iterator[None]:
        self, given = call.self, call.arguments
        tower = self.get_vision_tower()
        ids, images = given["input_ids"], given.get("images")
        if not is_packing_tower(tower) or ids is None or ids.shape[1] == 1 or not takes_part(self):
            yield
            return
        if images is None or len(images) == 0:
            if asked := int((ids == arch.IMAGE_TOKEN_INDEX).sum()):
                raise ValueError(f"the text has {asked} <image>, but there are no images")
            blanks = blank_images(tower, len(ids))
            instead = {"images": blanks, "image_sizes": [tuple(blanks.shape[-2:])] * len(ids)}
            instead["modalities"] = ["image"] * len(ids)
            given.update({name: value for name, value in instead.items() if name in takes})
        yield
        newline = getattr(self.get_model(), "image_newline", None)
        result = list(call.result)
        if newline is not None and newline.requires_grad and result[embeds] is not None:
            result[embeds] = result[embeds] + 0 * newline.sum()
        call.result = tuple(result)

    add_step(owner, f"LlavaMetaForCausalLM.{PREPARE}", "blank_images", run_blanks, patches)


class OneLookup:
    """Stands for a word embedding while LLaVA puts the samples of a batch together: one call for all their words.

    ids: ``[N]``, the words of all samples in the order in which LLaVA asks for them, where the embedding takes them.
    """

    def __init__(self, embedding: torch.nn.Module, ids: torch.Tensor) -> None:
        self.rows, self.taken = embedding(ids), 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """``[n, hidden]`` of the next ``n`` words."""
        start, self.taken = self.taken, self.taken + len(ids)
        if self.taken > len(self.rows):
            raise RuntimeError(f"LLaVA asks for the embeddings of {self.taken} words of a batch of {len(self.rows)}")
        return self.rows[start : self.taken]


def look_up_once(arch: ModuleType, patches: Patches) -> None:
    """Have LLaVA look up the embeddings of a batch once: for each sample alone, each has a gradient of all words.

    Where words are not put together on the host (:mod:`.words_on_host`), only if ranks gather the embeddings or have
    different numbers of samples.
    In a step, ``RuntimeError`` if LLaVA looks up other words than expected.
    """
    from .packed_step import are_weighed

    keeps_padding = host_of(arch).keeps_padding

    def once(call: Call) -> Iterator[None]:
        self, given = call.self, call.arguments
        ids, mask = given["input_ids"], given.get("attention_mask")
        asked = are_moved(ids) or zero3_enabled() or are_weighed()
        if not asked or not takes_part(self) or not is_packing_tower(self.get_vision_tower()):
            yield
            return
        inner = self.get_model()
        seen = torch.ones_like(ids, dtype=torch.bool) if mask is None or keeps_padding else mask.bool()
        words = ids[seen & (ids != arch.IMAGE_TOKEN_INDEX)]
        lookup = OneLookup(inner.embed_tokens, to_device(words, device_before(ids)))
        vars(inner)["embed_tokens"] = lookup  # in front of the module, which stays where it is
        try:
            yield
        finally:
            del vars(inner)["embed_tokens"]
        if lookup.taken != len(lookup.rows):
            raise RuntimeError(f"LLaVA used the embeddings of {lookup.taken} words of a batch of {len(lookup.rows)}")

    add_step(mixin(arch), f"LlavaMetaForCausalLM.{PREPARE}", "one_lookup", once, patches)
