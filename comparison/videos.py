"""Questions of a video benchmark in the published layout, answered by Video-LLaVA."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import strategy
from comparison.cli import config_of
from comparison.inspection import Inspection, StageRecorder
from comparison.runs import DOWNSAMPLE, Run, run_of
from strategy.backbone import find_backbone
from strategy.evaluation.ahead import prepare_ahead
from videollava.eval.video.matching import matches
from videollava.eval.video.questions import Sample, read_samples
from videollava.eval.video.run_inference_video_qa import Answerer
from videollava.mm_utils import MEAN, STD


class Videos:
    """An `Evaluator` of Video-LLaVA; its tasks are folders with test_q.json, test_a.json and videos/.

    Args:
        model: The model's name.
        pretrained: Folder or hub id of the weights.
        model_args: Has to be empty.
        include_path: Not used, since tasks are folders.

    Raises:
        ValueError: There are arguments for the model.
    """

    def __init__(self, model: str, pretrained: str, model_args: str, include_path: str | None) -> None:
        if model_args:
            raise ValueError(f"--model_args {model_args}: {model} has no such arguments: leave them out")
        self.package = Answerer.__module__.partition(".")[0]
        self.pretrained = pretrained

    @cached_property
    def _answerer(self) -> Answerer:
        return Answerer(self.pretrained)

    def _samples(self, task: str, limit: int | None) -> list[Sample]:
        self._answerer.video_dir = str(Path(task) / "videos")
        samples, left_out = read_samples(Path(task) / "test_q.json", Path(task) / "test_a.json")
        if left_out:
            raise ValueError(
                f"--tasks {task}: leave out the {len(left_out)} entries that cannot be answered; the first one: "
                f"{left_out[0].reason}"
            )
        return samples[:limit]

    def run(self, task: str, options: Mapping[str, Any], limit: int | None) -> Run:
        """Answer and score a benchmark's questions, the first `limit` if given."""
        if DOWNSAMPLE in options:
            raise ValueError("downsample makes pictures smaller, and the frames of Video-LLaVA have one size")
        samples, answers = self._samples(task, limit), []
        with strategy.prune(self._answerer.model, config_of(options)) as record:
            start = time.perf_counter()
            with closing(prepare_ahead(self._answerer.prepare, samples)) as ready:
                for prepared in tqdm(ready, total=len(samples), desc="Answering", unit="question"):
                    answers += self._answerer([prepared])
            seconds = time.perf_counter() - start
        scores = tuple(float(matches(answer, sample.answer)) for answer, sample in zip(answers, samples, strict=True))
        return run_of(
            options,
            task=task,
            metric="accuracy",
            accuracy=sum(scores) / len(scores),
            scores=scores,
            answers=tuple(answers),
            targets=tuple(sample.answer for sample in samples),
            record=record.means(),
            graph_report=record.graph_report(),
            nominal_tokens=find_backbone(self._answerer.model).nominal_tokens,
            samples=tuple(
                json.dumps(
                    {
                        "doc_id": number,
                        "doc": {"question": sample.question, "answer": sample.answer},
                        "target": sample.answer,
                        "filtered_resps": answer,
                        "accuracy": score,
                    }
                )
                for number, (sample, answer, score) in enumerate(zip(samples, answers, scores, strict=True))
            ),
            seconds=seconds / len(samples),
        )

    def inspect_many(
        self, task: str, numbers: Sequence[int], options: Mapping[str, Any], limit: int | None
    ) -> list[Inspection]:
        """Answer some of the questions one by one, and return how each was answered."""
        samples = self._samples(task, limit)
        return [self._inspect(samples[number], options) for number in numbers]

    def inspect_one(self, image: str, question: str, options: Mapping[str, Any]) -> Inspection:
        """Answer a question about the video in a file; ValueError if the file cannot be decoded."""
        self._answerer.video_dir = str(Path(image).parent)
        return self._inspect(Sample(0, Path(image).name, question, ""), options)

    def _inspect(self, sample: Sample, options: Mapping[str, Any]) -> Inspection:
        # Only the stock loop can be watched; an engine that the user gave stays, so that a warning says so.
        config = config_of(options, engine="eager")
        recorder, prepared = StageRecorder(config), self._answerer.prepare(sample)
        with strategy.prune(self._answerer.model, config, watch=recorder) as record:
            [answer] = self._answerer([prepared])
        return recorder.inspection(sample.question, sample.answer, answer, _frames(prepared[1]), record)


def _frames(video: Tensor) -> list[Image.Image]:
    """Return the frames of a prepared video [3, T, H, W] as pictures."""
    pixels = video.transpose(0, 1).float().cpu() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return [to_pil_image(frame.clamp(0, 1)) for frame in pixels]
