"""Write the 400 test questions of each task, with their pictures, as the parquet file the task reads."""

import io
import itertools
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, Value
from torchvision.transforms.functional import to_pil_image

import world

TASKS = Path(__file__).parent / "tasks"
PICTURES = 200
AREA, ASPECT = (205_000, 260_000), (0.6, 1 / 0.6)  # of pictures of varied size, in pixels and as height by width


@dataclass(frozen=True)
class TestSet:
    """One task's questions: the file, the first seed of its scenes, how its pictures are made, and their world."""

    file: Path
    first_seed: int
    varied: bool
    quality: int
    subject: ModuleType = world

    def size(self, rng: random.Random) -> tuple[int, int]:
        """Height and width of the next picture."""
        if not self.varied:
            return world.SIDE, world.SIDE
        aspect = math.exp(rng.uniform(*map(math.log, ASPECT)))
        height = math.sqrt(rng.uniform(*AREA) * aspect)
        return round(height), round(height / aspect)


SETS = (
    TestSet(TASKS / "shapes_test.parquet", 0, False, 84),
    TestSet(TASKS / "shapes_varied_test.parquet", world.FIRST_TRAINING_SEED // 2, True, 70),
)


def rows(test: TestSet) -> Iterator[dict[str, Any]]:
    """Two questions of different families a picture, 80 of each family."""
    families = itertools.cycle(test.subject.FAMILIES)
    rng = random.Random(0)
    seeds = iter(range(test.first_seed, world.FIRST_TRAINING_SEED))
    for number in range(PICTURES):
        wanted = [next(families), next(families)]
        asked: list[world.Question] = []
        while len(asked) < 2:  # not every scene has, say, a colour that only one object has
            seed = next(seeds)
            scenes = test.subject.sample_scenes(1, seed, test.size(rng))
            candidates = list(test.subject.questions(scenes, 0))
            asked = [q for f in wanted for q in world.choose([c for c in candidates if c.family == f], 1, rng)]
        picture = io.BytesIO()
        to_pil_image(test.subject.render(scenes, seed)[0]).save(picture, "JPEG", quality=test.quality)
        for place, question in enumerate(asked):
            yield {
                "question_id": f"{number:03d}-{place}",
                "image": {"bytes": picture.getvalue(), "path": None},
                "question": question.text,
                "answer": question.answer,
                "family": question.family,
            }


def write(sets: Iterable[TestSet]) -> None:
    """Write the files."""
    text = Value("string")
    features = Features(dict.fromkeys(("question_id", "question", "answer", "family"), text) | {"image": Image()})
    for test in sets:
        table = Dataset.from_list(list(rows(test)), features=features).data.table
        # Questions about one picture share it, in a dictionary that has room for all pictures.
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
        pq.write_table(table, test.file, compression="zstd", dictionary_pagesize_limit=1 << 27)
        print(f"{test.file.name}: {test.file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    write(SETS)
