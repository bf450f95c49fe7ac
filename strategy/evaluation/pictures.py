"""One way to open a picture, and one way to turn it into RGB, for every model and command."""

import io
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, ImageOps

WIDE_MODES = ("I", "F")  # and those that begin with "I;": their values go beyond 255
LARGEST_16_BIT = 65535.0
UPRIGHT = 1  # EXIF's orientation of a picture that is not to be turned
WHITE = (255, 255, 255)
LOCKS = [threading.Lock() for _ in range(61)]


def open_picture(file: str | Path | io.BytesIO) -> Image.Image:
    """Open and decode a picture.

    Args:
        file: A path, or the bytes of a file.

    Raises:
        ValueError: The file is missing, holds no picture, or holds an animated one.
    """
    name = f"{file}: " if isinstance(file, (str, Path)) else ""
    try:
        picture = Image.open(file)
        check_picture(picture)
    # A decoder of untrusted pictures may raise anything.
    except Exception as error:
        raise ValueError(f"{name}{_reason(error, file)}") from error
    return picture


def check_picture(picture: Image.Image) -> None:
    """Decode a picture.

    Raises:
        ValueError: The picture is animated.
        Exception: What the picture's decoder raises.
    """
    if is_animated(picture):
        raise ValueError(f"an animated picture of {getattr(picture, 'n_frames', 2)} frames, want one frame or a video")
    with lock_of(picture):
        picture.load()


def lock_of(picture: Image.Image) -> threading.Lock:
    """Return the lock that is held while a picture is decoded, since several questions may be about one picture.

    Pillow's pictures can be read by several threads only once they are decoded. Different pictures seldom share a lock.
    """
    return LOCKS[id(picture) // 16 % len(LOCKS)]


def is_animated(picture: Any) -> bool:
    """Return whether a picture has several frames; the preview that cameras store beside a photo is none."""
    return bool(getattr(picture, "is_animated", False)) and getattr(picture, "format", None) != "MPO"


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture as it is meant to be seen, in RGB; the picture itself if it is that already.

    The picture is turned as its EXIF data say; what is transparent becomes white; values of more than 8 bits are scaled
    to 8 bits, see `_scaled`.

    Raises:
        ValueError: The picture has values that are not finite, or a mode that cannot be converted.
    """
    with suppress(Exception), lock_of(picture):  # broken EXIF data are no reason to lose the picture
        if picture.getexif().get(ExifTags.Base.Orientation, UPRIGHT) != UPRIGHT:
            picture = ImageOps.exif_transpose(picture)
    if picture.mode in WIDE_MODES or picture.mode.startswith("I;"):
        return _scaled(picture).convert("RGB")
    if picture.mode == "La":  # Pillow converts this mode to its unmultiplied form only
        picture = picture.convert("LA")
    if not picture.has_transparency_data:
        # A copy of each picture of each question would take milliseconds.
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    seen = picture.convert("RGBA")
    background = Image.new("RGB", seen.size, WHITE)
    background.paste(seen, mask=seen.getchannel("A"))
    return background


def _scaled(picture: Image.Image) -> Image.Image:
    """Return a picture of wide values as 8-bit grey.

    What 16 bits or fewer can hold keeps its brightness: 16-bit modes and whole numbers up to 65535 are divided by 257,
    floats from 0 to 1 are multiplied by 255, and values up to 255 in a 32-bit mode stay. Other values are stretched, so
    that the smallest becomes black and the largest white.
    """
    values = torch.frombuffer(bytearray(picture.convert("F").tobytes()), dtype=torch.float32).double()
    if not values.isfinite().all():
        raise ValueError(f"a picture of mode {picture.mode} with values that are not finite")
    low, high = (float(bound) for bound in values.aminmax())
    black, white = 0.0, 255.0
    if low < 0 or high > LARGEST_16_BIT:
        black, white = low, high
    elif picture.mode.startswith("I;") or high > 255:
        white = LARGEST_16_BIT
    elif picture.mode == "F" and high <= 1:
        white = 1.0
    grey = ((values - black) * (255 / (white - black or 1))).round().to(torch.uint8)
    return Image.frombytes("L", picture.size, grey.numpy().tobytes())


def picture_in(value: Any) -> Image.Image | None:
    """Return the picture in a value that a data set may hold: a picture, or its bytes or path; None for another value.

    Raises:
        ValueError: The picture cannot be read.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping) and {"bytes", "path"} >= set(value) and any(value.values()):
        return open_picture(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])
    return None


def _reason(error: Exception, file: object) -> str:
    """Return an error's message in one line, without the file's name; or else the name of its type."""
    text = getattr(error, "strerror", None) or str(error).replace(repr(file), "").replace(repr(str(file)), "")
    return " ".join(text.split()) or type(error).__name__
