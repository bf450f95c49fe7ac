"""A benchmark of videos in the published layout, asked of Video-LLaVA."""

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import strategy
from comparison.runs import Run, named
from comparison.watching import Look, Watch, look
from videollava.eval.video.matching import matches
from videollava.eval.video.questions import Sample, read_samples
from videollava.eval.video.run_inference_video_qa import Answerer
from videollava.mm_utils import MEAN, STD


class Videos:
    """Runs a benchmark: a folder with test_q.json, test_a.json and videos/."""

    def __init__(self, model: str, pretrained: str, arguments: str, include_path: str | None) -> None:
        if arguments:
            raise ValueError(f"--model_args {arguments!r}: {model} takes none")
        self.pretrained = pretrained

    @cached_property
    def _answerer(self) -> Answerer:
        return Answerer(self.pretrained)

    def _samples(self, task: str, limit: int | None) -> list[Sample]:
        self._answerer.video_dir = str(Path(task) / "videos")
        samples, left_out = read_samples(Path(task) / "test_q.json", Path(task) / "test_a.json")
        if left_out:
            raise ValueError(f"{len(left_out)} entries cannot be asked, the first: {left_out[0].reason}")
        return samples[:limit]

    def run(self, task: str, knobs: Mapping[str, Any], limit: int | None) -> Run:
        """Answer and score a benchmark's questions, the first `limit` if given."""
        samples, answers = self._samples(task, limit), []
        with strategy.prune(self._answerer.model, strategy.VTRConfig(**knobs)) as record:
            start = time.perf_counter()
            for sample in tqdm(samples, desc="Answering", unit="question"):
                answers += self._answerer([self._answerer.prepare(sample)])
            seconds = time.perf_counter() - start
        scores = tuple(float(matches(said, sample.answer)) for said, sample in zip(answers, samples, strict=True))
        return named(
            knobs,
            task=task,
            metric="accuracy",
            accuracy=sum(scores) / len(scores),
            scores=scores,
            answers=tuple(answers),
            targets=tuple(sample.answer for sample in samples),
            record=record.means(),
            seconds=seconds / len(samples),
        )

    def looks(self, task: str, numbers: Sequence[int], knobs: Mapping[str, Any], limit: int | None) -> list[Look]:
        """Ask some of the questions again, one by one, and watch."""
        samples = self._samples(task, limit)
        return [self._look(samples[number], knobs) for number in numbers]

    def look(self, image: str, question: str, knobs: Mapping[str, Any]) -> Look:
        """Ask a question about a video in a file; ValueError if that cannot be decoded."""
        self._answerer.video_dir = str(Path(image).parent)
        return self._look(Sample(0, Path(image).name, question, ""), knobs)

    def _look(self, sample: Sample, knobs: Mapping[str, Any]) -> Look:
        config = strategy.VTRConfig(**knobs)
        watch, prepared = Watch(config), self._answerer.prepare(sample)
        with strategy.prune(self._answerer.model, config, watch=watch) as record:
            [answer] = self._answerer([prepared])
        return look(sample.question, sample.answer, answer, _shown(prepared[1]), watch, record)


def _shown(video: Tensor) -> list[Image.Image]:
    """The frames of a prepared video [3, T, H, W] as pictures."""
    pixels = video.transpose(0, 1).float().cpu() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return [to_pil_image(frame.clamp(0, 1)) for frame in pixels]
