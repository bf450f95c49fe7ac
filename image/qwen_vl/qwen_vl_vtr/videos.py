"""Videos in a form that lmms-eval's wrappers of the Qwen models can read."""

import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import decord

EXTENSION = ".mp4"  # which all wrappers take for a video's; they drop files with an extension that they do not know
DEFAULT_RATE = Fraction(10)  # frames a second, of a video that does not say


class VideoFiles:
    """Gives videos names, and if need be copies, that the wrappers can read; all are removed with this object.

    The wrappers know videos by a few extensions in lower case, and refuse those with too few frames.
    """

    def __init__(self) -> None:
        self._folder: TemporaryDirectory[str] | None = None  # made for the first name
        self._count, self._lock = 0, threading.Lock()  # threads share them

    def readable(self, file: Path, wanted: Callable[[int], int]) -> str:
        """Return the path of a video that the wrappers can read.

        Args:
            file: The video.
            wanted: Returns how many frames a video of so many frames should have.

        Raises:
            ValueError: The video cannot be decoded.
        """
        try:
            count = len(decord.VideoReader(str(file), num_threads=1))
        except (decord.DECORDError, RuntimeError):
            count = 0  # such as an animated GIF; the other library may read it
        if not count or wanted(count) != count:
            return str(self._copied(file, wanted))
        if file.name.endswith(EXTENSION):
            return str(file)
        link = self._new_name(EXTENSION)
        link.symlink_to(file.absolute())
        return str(link)

    def _new_name(self, extension: str) -> Path:
        with self._lock:
            self._folder = self._folder or TemporaryDirectory(prefix="videos-")
            self._count += 1
            return Path(self._folder.name) / f"{self._count}{extension}"

    def _copied(self, file: Path, wanted: Callable[[int], int]) -> Path:
        """Copy a video without loss, with frames repeated evenly up to the number that is wanted."""
        try:
            with av.open(str(file)) as video:
                rate = video.streams.video[0].average_rate or DEFAULT_RATE
                frames = list(video.decode(video=0))
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"{file}: cannot be decoded ({error})") from error
        if not frames:
            raise ValueError(f"{file}: cannot be decoded (it has no frames)")
        count = max(wanted(len(frames)), len(frames))
        copy = self._new_name(".avi")
        with av.open(str(copy), "w") as output:
            # The frame rate grows with the frames, so that the video lasts as long.
            rate = (Fraction(rate) * count / len(frames)).limit_denominator(1000)
            stream = output.add_stream("ffv1", rate=rate)
            stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "bgr0"
            for number in range(count):
                frame = frames[number * len(frames) // count].reformat(stream.width, stream.height, stream.pix_fmt)
                frame.time_base, frame.pts = 1 / rate, number
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return copy
