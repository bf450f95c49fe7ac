"""Videos, beside pictures and text, in one step."""

import numpy as np
import pytest
from engines import Question, Reference, questions, qwen_prompt, running

STRATEGIES = ("clse", "visionzip", "priortr_2f")
ASKED = "How many red objects are there?"


def video(family, first, count):
    """Pictures as the frames of a video."""
    shown = [each.pictures[0].resize((112, 112)) for each in questions(family, 10 * count, first)[::10]]
    return np.stack([np.asarray(picture) for picture in shown])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_videos_are_pruned_as_on_transformers(folders, family):
    clips = [video(family, first, count) for first, count in ((0, 4), (40, 4), (80, 2))]
    asked = [Question(qwen_prompt(ASKED, 1, "video"), videos=(clip,)) for clip in clips]
    asked += [Question(qwen_prompt(ASKED, 2, "video"), videos=tuple(clips[1:]))]
    asked += [*questions(family, 1), Question(qwen_prompt("Why?", 0))]
    reference, first = Reference(folders(family)), {"strategy": STRATEGIES[0], "retain_ratio": 0.2}
    with running(folders(family), first, limit_mm_per_prompt={"image": 1, "video": 2}) as engine:
        free = engine.free_blocks
        for name in STRATEGIES:
            vtr = first | {"strategy": name}
            engine.use(vtr)
            expected = [reference.answer(each, vtr if each.pictures or each.videos else None) for each in asked]
            assert engine.answer(asked) == expected
            assert engine.free_blocks == free
            assert all(answer.kept for answer in expected[:-1])
            assert not expected[-1].kept
