"""The prompts of Video-LLaVA: they begin as the published ones do, wherever they are made."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_video
from llava.conversation import conv_templates as llava_templates
from videollava.constants import IMAGE_TOKEN_INDEX, NUM_FRAMES
from videollava.conversation import conv_templates, default_conversation
from videollava.eval.video.questions import Sample
from videollava.eval.video.run_inference_video_qa import Answerer

BEFORE = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. USER:"
)
CLIPS = Path(train_video.__file__).parent / "clips_test/videos"


@pytest.fixture(scope="module")
def answerer(checkpoint):
    return Answerer(str(checkpoint), device="cpu", video_dir=str(CLIPS))


def test_both_packages_have_the_same_templates():
    assert conv_templates == llava_templates
    assert default_conversation == conv_templates["llava_v1"]


def test_the_script_asks_with_the_published_prompt(answerer):
    ids, _ = answerer.prepare(Sample("1", "clip000", "Which way does the star move?", "left", None))
    ids = ids.tolist()
    first = ids.index(IMAGE_TOKEN_INDEX)
    text = [token for token in ids if token != IMAGE_TOKEN_INDEX]
    assert answerer.tokenizer.decode(ids[:first], skip_special_tokens=True).strip() == BEFORE
    assert answerer.tokenizer.decode(text).endswith("Which way does the star move? ASSISTANT:")


@given(st.lists(st.sampled_from(["<image>", "<video>", "<s>", "</s>", "<unk>", "<", ">", " ", "star"])).map("".join))
def test_what_is_typed_is_text_and_only_one_video_is_a_place(answerer, text):
    ids, _ = answerer.prepare(Sample("1", "clip000", text, "left", None))
    ids = ids.tolist()
    first = ids.index(IMAGE_TOKEN_INDEX)
    assert ids[first : first + NUM_FRAMES] == [IMAGE_TOKEN_INDEX] * NUM_FRAMES
    typed = ids[1:first] + ids[first + NUM_FRAMES :]
    assert not {*answerer.tokenizer.all_special_ids, IMAGE_TOKEN_INDEX} & set(typed)
    # Only spaces have come between, and a single <video> is where the frames stand.
    asked = text.replace("<video>", "") if text.count("<video>") == 1 else text
    written = answerer.tokenizer.decode(typed)
    assert "".join(written.split()) == "".join(f"{BEFORE}{asked} ASSISTANT:".split())


def test_the_student_is_trained_with_the_prompt_that_the_script_asks(student, answerer):
    asked, answer = student.tokens("Which way does the star move?", "left")
    ids, _ = answerer.prepare(Sample("1", "clip000", "Which way does the star move?", "left", None))
    last = len(ids) - ids.tolist()[::-1].index(IMAGE_TOKEN_INDEX)
    assert student.before.tolist() == ids.tolist()[: ids.tolist().index(IMAGE_TOKEN_INDEX)]
    assert asked == ids.tolist()[last:]
    assert student.tokenizer.decode(answer).strip() == "left</s>"
