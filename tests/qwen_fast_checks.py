"""The prompts of the Qwens' small checkpoints for the fast path; each one's tests import all from here."""

from pathlib import Path

import pytest
import torch
from fast_checks import *  # noqa: F403
from fast_checks import Asked, answered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matrix import names_for
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

EXAMPLES = Path(__file__).parents[1] / "examples/shapes"
QUESTIONS = ("What is it?", "Is there a red circle in the picture or not?", "How many?")


SIZES = ((336, 336), (224, 336), (112, 168))
# A score, several stages, merged tokens, a selection, and prompts without their questions.
METHODS = ("unpruned", "clse", "pdrop", "sparsevlm", "divprune", "priortr_2f")


def prompt_maker(checkpoint_name, device):
    processor = AutoProcessor.from_pretrained(EXAMPLES / "checkpoints" / checkpoint_name)
    processor.tokenizer.padding_side = "left"
    picture = Image.open(EXAMPLES / "picture.jpg").convert("RGB")

    def prompts(questions, sizes):
        """Prompts, given the sizes of each one's pictures."""
        content = [
            [{"role": "user", "content": [*[{"type": "image"}] * len(own), {"type": "text", "text": question}]}]
            for question, own in zip(questions, sizes, strict=True)
        ]
        text = [processor.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in content]
        pictures = [picture.resize(size) for own in sizes for size in own]
        return dict(processor(text=text, images=pictures or None, return_tensors="pt", padding=True).to(device))

    return prompts


def small(checkpoint_name, device):
    folder, prompts = EXAMPLES / "checkpoints" / checkpoint_name, prompt_maker(checkpoint_name, device)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    large, wide, _ = SIZES
    kinds = {
        "one": prompts(QUESTIONS[:1], [[large]]),
        "several": prompts(QUESTIONS, [[large]] * 3),
        "mixed": prompts(QUESTIONS, [[large], [], [wide]]),
        "text": prompts(QUESTIONS[:1], [[]]),
    }
    return Asked(model, kinds, {"retain_ratio": 0.223}, names_for(checkpoint_name.removeprefix("shapes-")))


@pytest.fixture(scope="module")
def asked(device, checkpoint_name):
    return small(checkpoint_name, device)


@pytest.fixture(scope="module")
def prompts(device, checkpoint_name):
    return prompt_maker(checkpoint_name, device)


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(QUESTIONS), st.lists(st.sampled_from(SIZES), max_size=2)), min_size=2, max_size=7
    ),
    name=st.sampled_from(METHODS),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mix_of_prompts_is_answered_as_by_the_stock_loop(asked, prompts, rows, name):
    asked.prompts["any"] = prompts(*zip(*rows, strict=True))
    options = {"enabled": False} if name == "unpruned" else {"strategy": name}
    (stock, told), (tokens, run) = (answered(asked, "any", engine=engine, **options) for engine in ("eager", "graph"))
    assert torch.equal(tokens, stock)
    assert [(each.layer, each.before, each.after) for each in run.stages] == [
        (each.layer, each.before, each.after) for each in told.stages
    ]
    for ours, theirs in zip(run.stages, told.stages, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.kept, theirs.kept, strict=True))
