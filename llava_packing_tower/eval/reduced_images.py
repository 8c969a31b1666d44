"""Which images of an evaluation ``mm_packing_max_patches`` has reduced, for its log."""

from __future__ import annotations

import sys

from ..multimodal.dataset_report import WORST, over_the_bound


class ReducedImages:
    """Collects the images of requests; an image that is asked about again counts once."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def note(self, scaling: float | None, name: str) -> None:
        """scaling: see :meth:`..data.smart_resize.SmartResize.scaling`."""
        if scaling is not None and scaling > 1:
            self.found[name] = scaling

    def report(self) -> None:
        """Say how many there were and which lost most; begins anew."""
        if self.found:
            worst = sorted(((times, name) for name, times in self.found.items()), reverse=True)[:WORST]
            print(f"llava_packing: {over_the_bound(len(self.found), worst)}", file=sys.stderr, flush=True)
        self.found = {}
