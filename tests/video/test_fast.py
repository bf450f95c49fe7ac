"""The fast path of Video-LLaVA, on its small checkpoint."""

from pathlib import Path

import pytest
import torch
from fast_checks import *  # noqa: F403
from fast_checks import Asked
from matrix import names_for

from llava.mm_utils import pad_left
from videollava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from videollava.mm_utils import load_video, prepare_prompt, prepare_video, tokenizer_image_token
from videollava.model.builder import load_pretrained_model

CHECKPOINT = Path(__file__).parents[2] / "examples/shapes/checkpoints/shapes-video"
QUESTIONS = ("What colour is the star?", "Which way does the purple object move?", "How many rings are there?")


@pytest.fixture(scope="module")
def asked(device):
    tokenizer, model, _ = load_pretrained_model(str(CHECKPOINT), device=device, dtype=torch.float32)
    side = model.model.video_tower.config.image_size
    files = [CHECKPOINT.parents[1] / f"clips_test/videos/clip00{number}.mp4" for number in range(3)]
    videos = [prepare_video(load_video(file), side) for file in files]
    still = videos[0][:, 0]

    def prompts(questions, visuals, frames):
        ids = [
            tokenizer_image_token(
                (
                    f"USER: {prepare_prompt(q)} ASSISTANT:"
                    if n == 8
                    else f"USER: {DEFAULT_IMAGE_TOKEN * n}\n{q} ASSISTANT:"
                ),
                tokenizer,
                IMAGE_TOKEN_INDEX,
                "pt",
            )
            for q, n in zip(questions, frames, strict=True)
        ]
        padded, mask = pad_left(ids)
        return {"inputs": padded, "attention_mask": mask, "images": visuals, "pad_token_id": 0}

    kinds = {
        "one": prompts(QUESTIONS[:1], videos[:1], [8]),
        "several": prompts(QUESTIONS, videos, [8] * 3),
        "mixed": prompts(QUESTIONS, [videos[0], still], [8, 0, 1]),
        "text": prompts(QUESTIONS[:1], [], [0]),
    }
    return Asked(model, kinds, {"keep_tokens": 194}, names_for("video"))
