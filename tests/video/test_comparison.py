import threading

import pytest
from comparison_checks import *  # noqa: F403
from comparison_checks import ROOT, Asked

from comparison.videos import Videos
from videollava.eval.video.run_inference_video_qa import Answerer

CLIPS = "examples/shapes/clips_test"


@pytest.fixture
def asked():
    clip = f"{CLIPS}/videos/clip000.mp4"
    return Asked(
        "videollava", "shapes-video", str(ROOT / CLIPS), clip, "Which way does the purple object move?", frames=8
    )


def test_clips_are_prepared_by_other_threads(asked, monkeypatch):
    readers, prepare = [], Answerer.prepare

    def prepared(self, sample):
        readers.append(threading.current_thread())
        return prepare(self, sample)

    monkeypatch.setattr(Answerer, "prepare", prepared)
    videos = Videos("videollava", str(ROOT / "examples/shapes/checkpoints" / asked.checkpoint), "", None)
    run = videos.run(asked.task, {"enabled": False}, 3)
    assert run.accuracy == 1
    assert len(readers) == 3
    assert threading.current_thread() not in readers
    assert not any(thread.is_alive() for thread in readers)
