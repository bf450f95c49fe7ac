"""Pictures and clips of random colours, on disk, about as large as photos and videos of their size are."""

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

GRAIN = 8  # pixels along the side of what has a colour of its own
QUALITY = 90  # of JPEG
SECONDS, RATE, CLIP_SIZE = 10, 25, (320, 240)  # of a clip: how long, frames a second, pixels


def random_picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Return a picture (width, height) of random colours that run into each other."""
    columns, rows = (-(-pixels // GRAIN) for pixels in size)
    colours = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def write_picture(file: Path, seed: int, size: tuple[int, int]) -> None:
    """Write a picture (width, height) as JPEG."""
    random_picture(size, seed).save(file, quality=QUALITY)


def write_clip(file: Path, seed: int) -> None:
    """Write a clip, a look that wanders over a wide picture, as H.264."""
    import av  # noqa: PLC0415  only the environments of models that see videos have it

    (width, height), frames = CLIP_SIZE, SECONDS * RATE
    wide = np.asarray(random_picture((width + frames, height), seed))
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(RATE))
        stream.width, stream.height = CLIP_SIZE
        stream.pix_fmt, stream.options = "yuv420p", {"preset": "ultrafast", "threads": "1"}
        for left in range(frames):
            seen = np.ascontiguousarray(wide[:, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(seen, "rgb24")))
        container.mux(stream.encode())
