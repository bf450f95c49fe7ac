import pytest
from comparison_checks import *  # noqa: F403
from comparison_checks import ROOT, Asked

CLIPS = "examples/shapes/clips_test"


@pytest.fixture
def asked():
    clip = f"{CLIPS}/videos/clip000.mp4"
    return Asked(
        "videollava", "shapes-video", str(ROOT / CLIPS), clip, "Which way does the purple object move?", frames=8
    )
