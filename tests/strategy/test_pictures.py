"""How pictures are opened and turned into RGB: as they are meant to be seen, whatever their mode."""

import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from strategy.evaluation.pictures import check_picture, lock_of, open_picture, picture_in, to_rgb

LEVELS = np.arange(256).reshape(16, 16)
MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La")
WIDE = {
    "16-bit grey": (LEVELS * 257).astype(np.uint16),
    "big-endian": (LEVELS * 257).astype(">u2"),
    "32-bit grey of 16 bits": (LEVELS * 257).astype(np.int32),
    "32-bit grey of 8 bits": LEVELS.astype(np.int32),
    "32-bit grey of any values": (LEVELS * 1000 - 5000).astype(np.int32),
    "floats up to 1": (LEVELS / 255).astype(np.float32),
    "floats up to 255": LEVELS.astype(np.float32),
    "floats of 16 bits": (LEVELS * 257).astype(np.float32),
    "floats of any values": (LEVELS / 100 - 1).astype(np.float32),
}


def as_picture(values):
    if values.dtype == np.dtype(">u2"):
        return Image.frombytes("I;16B", values.shape[::-1], values.tobytes())
    return Image.fromarray(values)


def stored(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("values", WIDE.values(), ids=WIDE)
def test_wide_values_keep_their_brightness(values):
    grey = np.asarray(to_rgb(as_picture(values)))
    assert grey.shape == (16, 16, 3)
    assert (grey == LEVELS[..., None]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_stored_picture_of_16_bits_does_not_become_white(kind):
    opened = open_picture(stored(as_picture(WIDE["16-bit grey"]), kind))
    assert (np.asarray(to_rgb(opened))[..., 0] == LEVELS).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value):
    values = np.ones((3, 3), np.float32)
    values[1, 1] = value
    with pytest.raises(ValueError, match="mode F with values that are not finite"):
        to_rgb(Image.fromarray(values))


def test_what_is_transparent_becomes_white():
    red = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    red.putpixel((0, 0), (255, 0, 0, 0))
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    key = stored(Image.new("RGB", (2, 1), (9, 9, 9)), "PNG", transparency=(9, 9, 9))
    assert [to_rgb(red).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]
    assert to_rgb(Image.new("LA", (1, 1), (0, 127))).getpixel((0, 0)) == (128, 128, 128)
    assert to_rgb(open_picture(key)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(palette).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_say(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_picture(stored(Image.new("RGB", (40, 20)), "JPEG", exif=exif))
    turned = to_rgb(opened)
    assert turned.size == ((40, 20) if orientation < 5 else (20, 40))
    assert to_rgb(turned).size == turned.size


def test_a_picture_is_decoded_and_its_exif_data_are_read_by_one_thread_at_a_time():
    held = []

    class Watched(Image.Image):
        def load(self):
            held.append(lock_of(self).locked())
            return super().load()

        def getexif(self):
            held.append(lock_of(self).locked())
            return super().getexif()

    picture = Watched()
    picture.im, picture._size, picture._mode = Image.core.fill("RGB", (4, 4), 0), (4, 4), "RGB"
    check_picture(picture)
    assert to_rgb(picture) is picture
    assert held == [True, True]
    assert not lock_of(picture).locked()


def test_broken_exif_data_cost_nothing():
    opened = open_picture(stored(Image.new("RGB", (40, 20)), "JPEG", exif=b"Exif\0\0MM nonsense"))
    assert to_rgb(opened).size == (40, 20)


@given(mode=st.sampled_from(MODES), width=st.integers(1, 300), height=st.integers(1, 300), data=st.data())
def test_any_mode_and_size_becomes_rgb(mode, width, height, data):
    bands = {"F": 4, "I": 4}.get(mode) or len(Image.new(mode, (1, 1)).tobytes())
    pixel = data.draw(st.binary(min_size=bands, max_size=bands))
    row = -(-width // 8) if mode == "1" else width * bands
    picture = Image.frombytes(mode, (width, height), (pixel * width)[:row] * height)
    if mode == "F" and not math.isfinite(picture.getpixel((0, 0))):
        with pytest.raises(ValueError, match="not finite"):
            to_rgb(picture)
    else:
        assert (to_rgb(picture).mode, to_rgb(picture).size) == ("RGB", (width, height))


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"", "cannot identify image file"), (b"no picture", "cannot identify image file")],
)
def test_a_file_that_is_no_picture_is_named(tmp_path, content, words):
    file = tmp_path / "x.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        open_picture(file)
    assert str(error.value).count(str(file)) == 1


def test_an_animated_picture_is_refused():
    frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
    with pytest.raises(ValueError, match="an animated picture of 2 frames, want one frame or a video"):
        open_picture(stored(frames[0], "GIF", save_all=True, append_images=frames[1:]))


def test_a_picture_may_be_given_as_data_sets_hold_it(tmp_path):
    content = stored(Image.new("RGB", (3, 2)), "PNG").getvalue()
    (tmp_path / "x.png").write_bytes(content)
    values = [{"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "x.png")}]
    assert [picture_in(value).size for value in [*values, Image.new("L", (3, 2))]] == [(3, 2)] * 3
    assert [picture_in(value) for value in ("x.png", {"array": []}, {"bytes": None, "path": None}, 1)] == [None] * 4
