"""Write the 400 test questions, with their pictures, as the parquet file the task reads."""

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Value
from torchvision.transforms.functional import to_pil_image

import world

PICTURES, QUALITY = 200, 84
FILE = Path(__file__).parent / "tasks" / "shapes_test.parquet"


def rows() -> Iterator[dict[str, Any]]:
    """Two questions of different families a picture, 80 of each family."""
    families = itertools.cycle(world.FAMILIES)
    rng = random.Random(0)
    seeds = iter(range(world.FIRST_TRAINING_SEED))
    for number in range(PICTURES):
        wanted = [next(families), next(families)]
        asked: list[world.Question] = []
        while len(asked) < 2:  # not every scene has, say, a colour that only one object has
            seed = next(seeds)
            scenes = world.sample_scenes(1, seed)
            candidates = list(world.questions(scenes, 0))
            asked = [q for f in wanted for q in world.choose([c for c in candidates if c.family == f], 1, rng)]
        picture = io.BytesIO()
        to_pil_image(world.render(scenes, seed)[0]).save(picture, "JPEG", quality=QUALITY)
        for place, question in enumerate(asked):
            yield {
                "question_id": f"{number:03d}-{place}",
                "image": {"bytes": picture.getvalue(), "path": None},
                "question": question.text,
                "answer": question.answer,
                "family": question.family,
            }


def main() -> None:
    """Write the file."""
    text = Value("string")
    features = Features(dict.fromkeys(("question_id", "question", "answer", "family"), text) | {"image": Image()})
    Dataset.from_list(list(rows()), features=features).to_parquet(FILE)
    print(f"{FILE}: {FILE.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
