"""The prompts of the Qwens' small checkpoints for the fast path; each one's tests import all from here."""

from pathlib import Path

import pytest
import torch
from fast_checks import *  # noqa: F403
from fast_checks import Asked
from matrix import names_for
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

EXAMPLES = Path(__file__).parents[1] / "examples/shapes"
QUESTIONS = ("What is it?", "Is there a red circle in the picture or not?", "How many?")


def small(checkpoint_name, device):
    folder = EXAMPLES / "checkpoints" / checkpoint_name
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    picture = Image.open(EXAMPLES / "picture.jpg").convert("RGB")

    def prompts(questions, sizes):
        content = [
            [{"role": "user", "content": [*[{"type": "image"}] * bool(size), {"type": "text", "text": question}]}]
            for question, size in zip(questions, sizes, strict=True)
        ]
        text = [processor.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in content]
        pictures = [picture.resize(size) for size in sizes if size]
        return dict(processor(text=text, images=pictures or None, return_tensors="pt", padding=True).to(device))

    kinds = {
        "one": prompts(QUESTIONS[:1], [(336, 336)]),
        "several": prompts(QUESTIONS, [(336, 336)] * 3),
        "mixed": prompts(QUESTIONS, [(336, 336), None, (224, 336)]),
        "text": prompts(QUESTIONS[:1], [None]),
    }
    return Asked(model, kinds, {"retain_ratio": 0.223}, names_for(checkpoint_name.removeprefix("shapes-")))


@pytest.fixture(scope="module")
def asked(device, checkpoint_name):
    return small(checkpoint_name, device)
