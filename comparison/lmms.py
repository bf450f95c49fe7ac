"""A task of lmms-eval, asked of one of its models."""

import gc
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager, get_task_dict
from PIL import Image

import strategy
from comparison.runs import Run, named
from comparison.watching import Look, Watch, look


class Lmms:
    """Runs a task on a model of lmms-eval that prunes: `llava_vtr`, `qwen2_vl_vtr` or `qwen3_vl_vtr`.

    arguments: more of `--model_args`. Each run loads the model anew, since lmms-eval takes it apart.
    """

    def __init__(self, model: str, pretrained: str, arguments: str, include_path: str | None) -> None:
        self.model, self.include_path = model, include_path
        self.arguments = ",".join(filter(None, (f"pretrained={pretrained}", arguments)))

    def load(self, knobs: Mapping[str, Any], **options: Any) -> Any:
        """The model with these pruning knobs; SystemExit with a sentence if it cannot be."""
        # The model before this one lies in a cycle with its hooks, and both may not fit.
        gc.collect()
        text = ",".join([self.arguments, *(f"{name}={value}" for name, value in knobs.items())])
        return get_model(self.model, **options).create_from_arg_string(text)

    @cached_property
    def _tasks(self) -> TaskManager:
        # lmms-eval reads thousands of files for it, which takes seconds.
        return TaskManager(include_path=self.include_path, model_name=self.model)

    def run(self, task: str, knobs: Mapping[str, Any], limit: int | None) -> Run:
        """Answer and score a task's questions, the first `limit` if given; ValueError for what is no single task."""
        tasks = self._tasks
        if task not in tasks.all_subtasks:
            raise ValueError(f"--tasks {task}: lmms-eval knows no single task of that name; name a group's tasks")
        lm = self.load(knobs)
        generate, seconds = lm.generate_until, [0.0]

        def timed(requests: list[Any]) -> list[str]:
            start = time.perf_counter()
            answers = generate(requests)
            seconds[0] += time.perf_counter() - start
            return answers

        lm.generate_until = timed
        results = simple_evaluate(
            model=lm, tasks=[task], task_manager=tasks, limit=limit, batch_size=1, log_samples=True
        )
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        metric, accuracy = _metric(results["results"][task])
        values = [sample.get(metric) for sample in samples]
        # A metric that is more than a mean over questions has no value a question.
        mean = all(isinstance(value, (int, float)) for value in values) and sum(values) / len(values)
        return named(
            knobs,
            task=task,
            metric=metric,
            accuracy=accuracy,
            scores=tuple(map(float, values)) if mean is not False and abs(mean - accuracy) < 1e-6 else (),
            answers=tuple(str(sample["filtered_resps"][0]) for sample in samples),
            targets=tuple(str(sample["target"]) for sample in samples),
            record=lm.record.means(),
            seconds=seconds[0] / len(samples),
        )

    def looks(self, task: str, numbers: Sequence[int], knobs: Mapping[str, Any], limit: int | None) -> list[Look]:
        """Ask some of a task's questions again, one by one, and watch."""
        lm = self.load(knobs)
        kind = "simple" if lm.is_simple else "chat"
        [asked] = get_task_dict([task], self._tasks, kind).values()
        asked.build_all_requests(limit=limit)
        lm.task_dict[task] = asked.dataset
        requests = {request.doc_id: request for request in asked.instances}
        looks = []
        for number in numbers:
            request = requests[number]
            document = asked.dataset[request.args[-1]][number]
            pictures = asked.doc_to_visual(document)
            looks.append(self._look(lm, request, knobs, request.args[0], pictures, str(asked.doc_to_target(document))))
        return looks

    def look(self, image: str, question: str, knobs: Mapping[str, Any]) -> Look:
        """Ask a question about a picture in a file; ValueError if that cannot be read."""
        try:
            picture = Image.open(image).convert("RGB")
        except (OSError, ValueError) as error:
            raise ValueError(f"--image {image}: {error}") from error
        lm = self.load(knobs, force_simple=True)
        lm.task_dict = {"look": {"test": [{}]}}
        options = {"max_new_tokens": 64, "temperature": 0, "do_sample": False}
        request = Instance(
            request_type="generate_until",
            arguments=(question, options, lambda document: [picture], 0, "look", "test"),
            idx=0,
            metadata={"task": "look", "repeats": 1, "doc_id": 0},
        )
        return self._look(lm, request, knobs, question, [picture], "")

    def _look(
        self, lm: Any, request: Any, knobs: Mapping[str, Any], question: Any, pictures: list[Any], target: str
    ) -> Look:
        config = strategy.VTRConfig(**knobs)
        watch = Watch(config)
        strategy.detach(lm.model)
        lm.record = strategy.attach(lm.model, config, watch=watch)
        [answer] = lm.generate_until([request])
        words = question if isinstance(question, str) else request.doc["question"]
        return look(words, target, answer, lm.as_seen(pictures), watch, lm.record)


def _metric(results: Mapping[str, Any]) -> tuple[str, float]:
    """A task's first metric; ValueError if none is a number."""
    for name, value in results.items():
        metric, _, _filter = name.partition(",")
        if isinstance(value, (int, float)) and _filter and not metric.endswith("_stderr"):
            return metric, float(value)
    raise ValueError(f"the task gives no metric that is a number: {', '.join(results)}")
