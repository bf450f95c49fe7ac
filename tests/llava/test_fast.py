"""The fast path of LLaVA, on its small checkpoint."""

from pathlib import Path

import pytest
import torch
from fast_checks import *  # noqa: F403
from fast_checks import Asked, answered, config
from matrix import names_for
from PIL import Image

import strategy
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import pad_left, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

EXAMPLES = Path(__file__).parents[2] / "examples/shapes"
QUESTIONS = ("<image>\nWhat is it?", "<image>\nIs there a red circle in the picture or not?", "<image>\nHow many?")


def small(device):
    tokenizer, model, processor, _ = load_pretrained_model(
        str(EXAMPLES / "checkpoints/shapes-llava"), device=device, dtype=torch.float32
    )
    picture = Image.open(EXAMPLES / "picture.jpg").convert("RGB")
    pictures = [picture, picture.rotate(90), picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    pixels = process_images(pictures, processor, model.config)

    def prompts(questions, images):
        ids = [tokenizer_image_token(f"USER: {q} ASSISTANT:", tokenizer, return_tensors="pt") for q in questions]
        padded, mask = pad_left(ids)
        return {"inputs": padded, "attention_mask": mask, "images": images, "pad_token_id": 0}

    kinds = {
        "one": prompts(QUESTIONS[:1], pixels[:1]),
        "several": prompts(QUESTIONS, pixels),
        "mixed": prompts((QUESTIONS[0], "What is red?", "<image><image>\nWhich is it?"), pixels),
        "text": prompts(("What is red?",), None),
    }
    return Asked(model, kinds, {"keep_tokens": 64}, names_for("llava"))


@pytest.fixture(scope="module")
def asked(device):
    return small(device)


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_both_engines_refuse_a_prompt_that_ends_with_its_picture(asked, engine):
    prompts = asked.prompts["one"]
    end = (prompts["inputs"] == IMAGE_TOKEN_INDEX).nonzero()[0, 1] + 1
    cut = prompts | {name: prompts[name][:, :end] for name in ("inputs", "attention_mask")}
    with (
        strategy.prune(asked.model, config(asked, engine=engine)),
        pytest.raises(ValueError, match=r"^sample 0: the visual tokens end at (\d+) of \1 tokens, but"),
    ):
        asked.model.generate(**cut, max_new_tokens=2, do_sample=False)
    assert torch.equal(*(answered(asked, "one", engine=each)[0] for each in ("eager", "graph")))
