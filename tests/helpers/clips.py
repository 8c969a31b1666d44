"""Generated clips in which one small thing moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SIZE = 24
"""Side in pixels of the thing."""


def place(number: int) -> tuple[int, int]:
    """Its upper and left edge in a frame: to the right, and up and down."""
    return 40 + 8 * ((number // 4) % 9), 16 + 3 * number


def write_clip(
    file: Path, frames: int = 128, width: int = 448, height: int = 256, codec: str = "libx264", grain: int = 0
) -> None:
    """A clip of a still background and the moving thing; ``grain``: noise of the camera, new in each frame."""
    import av

    draw = np.random.default_rng(0)
    tiles = draw.integers(0, 256, (height // 16, width // 16, 3))
    background = tiles.repeat(16, axis=0).repeat(16, axis=1).astype(np.uint8)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 48
        stream.codec_context.thread_count = 1
        for number in range(frames):
            picture = background.astype(int)
            top, left = place(number)
            picture[top : top + SIZE, left : left + SIZE] = (255, 20, 20)
            if grain:
                picture += draw.integers(-grain, grain + 1, picture.shape)
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
