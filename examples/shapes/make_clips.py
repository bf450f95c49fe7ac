"""Write the 200 test clips with their questions and answers, in the layout of the public video benchmarks."""

import itertools
import json
import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from torch import Tensor

import clips
import world

FOLDER = Path(__file__).parent / "clips_test"
CLIPS, RATE = 200, 11  # frames a second
# Two seconds, of which the eight frames a model sees are exactly those it would be trained on.
FRAMES = 3 * (clips.FRAMES - 1) + 1
QUALITY = 24  # of H.264: constant rate factor


def samples() -> Iterator[tuple[clips.Clips, int, world.Question]]:
    """One clip a question, with its seed; 40 questions of each family."""
    rng = random.Random(0)
    families = itertools.islice(itertools.cycle(clips.FAMILIES), CLIPS)
    seeds = iter(range(world.FIRST_TRAINING_SEED))
    for family in families:
        asked: list[world.Question] = []
        while not asked:  # not every clip has, say, a colour that only one object has
            seed = next(seeds)
            clip = clips.sample_clips(1, seed, FRAMES)
            asked = world.choose([q for q in clips.questions(clip, 0) if q.family == family], 1, rng)
        yield clip, seed, asked[0]


def write_video(file: Path, frames: Tensor) -> None:
    """Write frames [T, 3, H, W] in [0, 1] as H.264."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(RATE))
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": str(QUALITY), "preset": "veryslow", "threads": "1"}
        for picture in (frames * 255).round().byte().permute(0, 2, 3, 1).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def main() -> None:
    """Write them all."""
    asked, known = [], []
    (FOLDER / "videos").mkdir(parents=True, exist_ok=True)
    for number, (clip, seed, question) in enumerate(samples()):
        name = f"clip{number:03d}"
        write_video(FOLDER / "videos" / f"{name}.mp4", clip.render(seed)[0])
        asked.append({"question_id": f"{name}_0", "video_name": name, "question": question.text})
        known.append({"question_id": f"{name}_0", "answer": question.answer, "type": question.family})
    for file, entries in (("test_q.json", asked), ("test_a.json", known)):
        (FOLDER / file).write_text(json.dumps(entries, indent=1) + "\n")
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    print(f"{len(asked)} clips, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
