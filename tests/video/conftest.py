"""Video-LLaVA's tiny decoder for the shared engine checks, and an untrained checkpoint in its format."""

from pathlib import Path

import pytest
import torch
from engine_checks import Family
from llama_checks import llama

import train_llava
import train_video
import videollava  # noqa: F401  registers the backbone


@pytest.fixture(scope="session")
def family() -> Family:
    return llama("videollava", "video_194")


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> train_video.VideoStudent:
    torch.manual_seed(0)
    tokenizer = train_llava.load_tokenizer(
        tmp_path_factory.mktemp("tokenizer"), train_video.asked, train_video.TEMPLATE
    )
    student = train_video.VideoStudent(tokenizer).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)  # else an untrained model hardly looks at what it is shown
    return student


@pytest.fixture(scope="session")
def checkpoint(student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untrained") / "checkpoint"
    student.export(folder)
    student.float()
    return folder
