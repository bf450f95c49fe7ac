"""Questions of lmms-eval's tasks, answered by one of its models."""

import gc
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager, get_task_dict

import strategy
from comparison.cli import config_of
from comparison.inspection import Inspection, StageRecorder
from comparison.runs import NOMINAL, Run, run_of
from strategy.backbone import find_backbone
from strategy.evaluation.pictures import open_picture, to_rgb


class Lmms:
    """An `Evaluator` of a model of lmms-eval that prunes: `llava_vtr`, `qwen2_vl_vtr` or `qwen3_vl_vtr`.

    Each run loads the model anew, since lmms-eval takes it apart.

    Args:
        model: The model's name in lmms-eval.
        pretrained: Folder or hub id of the weights.
        model_args: More arguments of the model, as name=value,...
        include_path: Folder of more tasks.

    Raises:
        ValueError: No installed package brings a model of that name.
    """

    def __init__(self, model: str, pretrained: str, model_args: str, include_path: str | None) -> None:
        known = {entry.name: entry.module for entry in entry_points(group="lmms_eval.models")}
        if model not in known:
            raise ValueError(f"--model {model}: allowed in this environment are {', '.join(sorted(known)) or 'none'}")
        self.package = known[model].partition(".")[0]
        self.model, self.include_path = model, include_path
        self.model_args = ",".join(filter(None, (f'pretrained="{pretrained}"', model_args)))

    def load(self, options: Mapping[str, Any], force_simple: bool = False) -> Any:
        """Load the model with these pruning options; SystemExit with a sentence if that is not possible."""
        # The model before this one is in a reference cycle with its hooks, and both may not fit into memory.
        gc.collect()
        model = get_model(self.model, force_simple=force_simple)
        given = {name: value for name, value in options.items() if name != NOMINAL}
        return model.create_from_arg_string(self.model_args, given)

    @cached_property
    def _tasks(self) -> TaskManager:
        # It reads thousands of files of lmms-eval, which takes seconds.
        return TaskManager(include_path=self.include_path, model_name=self.model)

    def run(self, task: str, options: Mapping[str, Any], limit: int | None) -> Run:
        """Answer and score a task's questions, the first `limit` if given.

        Raises:
            ValueError: The name is not that of a single task.
        """
        tasks = self._tasks
        if task not in tasks.all_subtasks:
            raise ValueError(f"--tasks {task}: lmms-eval has no single task of that name; name a group's tasks")
        lm = self.load(options)
        nominal_tokens = find_backbone(lm.model).nominal_tokens  # lmms-eval takes the model away at the end
        results = simple_evaluate(
            model=lm, tasks=[task], task_manager=tasks, limit=limit, batch_size=1, log_samples=True
        )
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        metric, accuracy = _metric(results["results"][task])
        values = [sample.get(metric) for sample in samples]
        # A metric that is more than a mean over questions has no value a question.
        mean = all(isinstance(value, (int, float)) for value in values) and sum(values) / len(values)
        return run_of(
            options,
            task=task,
            metric=metric,
            accuracy=accuracy,
            scores=tuple(map(float, values)) if mean is not False and abs(mean - accuracy) < 1e-6 else (),
            answers=tuple(_answer(sample["filtered_resps"]) for sample in samples),
            targets=tuple(str(sample["target"]) for sample in samples),
            record=lm.record.means(),
            graph_report=lm.record.graph_report(),
            nominal_tokens=nominal_tokens,
            samples=tuple(map(_sample_line, samples)),
            seconds=lm.seconds / len(samples),
        )

    def inspect_many(
        self, task: str, numbers: Sequence[int], options: Mapping[str, Any], limit: int | None
    ) -> list[Inspection]:
        """Answer some of a task's questions one by one, and return how each was answered."""
        lm = self.load(options)
        kind = "simple" if lm.is_simple else "chat"
        [loaded] = get_task_dict([task], self._tasks, kind).values()
        loaded.build_all_requests(limit=limit)
        lm.task_dict[task] = loaded.dataset
        requests: dict[int, list[Any]] = {}
        for each in loaded.instances:  # several for a question whose choices are scored
            requests.setdefault(each.doc_id, []).append(each)
        inspections = []
        for number in numbers:
            own = requests[number]
            document = loaded.dataset[own[0].args[-1]][number]
            pictures, target = loaded.doc_to_visual(document), str(loaded.doc_to_target(document))
            inspections.append(self._inspect(lm, own, options, own[0].args[0], pictures, target))
        return inspections

    def inspect_one(self, image: str, question: str, options: Mapping[str, Any]) -> Inspection:
        """Answer a question about the picture in a file; ValueError if the file cannot be read."""
        try:
            picture = to_rgb(open_picture(image))
        except ValueError as error:
            raise ValueError(f"--image {error}") from error
        lm = self.load(options, force_simple=True)
        lm.task_dict = {"look": {"test": [{}]}}
        generation = {"max_new_tokens": 64, "temperature": 0, "do_sample": False}
        content = [{"type": "image", "url": picture}, {"type": "text", "text": question}]
        arguments: tuple[Any, ...] = (question, generation, lambda document: [picture], 0, "look", "test")
        if not lm.is_simple:  # a model that takes messages only
            messages = [{"role": "user", "content": content}]
            arguments = (question, lambda document: messages, generation, 0, "look", "test")
        request = Instance(
            request_type="generate_until",
            arguments=arguments,
            idx=0,
            metadata={"task": "look", "repeats": 1, "doc_id": 0},
        )
        return self._inspect(lm, [request], options, question, [picture], "")

    def _inspect(
        self, lm: Any, requests: list[Any], options: Mapping[str, Any], question: Any, pictures: list[Any], target: str
    ) -> Inspection:
        # Only the stock loop can be watched; an engine that the user gave stays, so that a warning says so.
        config = config_of(options, engine="eager")
        recorder = StageRecorder(config)
        strategy.detach(lm.model)
        lm.record = strategy.attach(lm.model, config, watch=recorder)
        answers = getattr(lm, requests[0].request_type)(requests)
        if lm.totals.unanswered:
            raise ValueError(f"the question {question!r} could not be answered, see above")
        text = question if isinstance(question, str) else requests[0].doc["question"]
        return recorder.inspection(text, target, _answer(answers), lm.as_seen(pictures), lm.record)


def _answer(responses: Sequence[Any]) -> str:
    """Return the answer among the responses to one question; where choices were scored, the number of the best one."""
    texts = [getattr(response, "text", response) for response in responses]
    if isinstance(texts[0], str):
        return texts[0]
    losses = [loss for loss, _ in texts]
    return str(losses.index(min(losses)))


def _sample_line(sample: Mapping[str, Any]) -> str:
    """Return what lmms-eval logs of a question as a line of its files, with the document, which newer versions omit."""
    kept = {name: value for name, value in sample.items() if name not in ("arguments", "resps", "token_counts")}
    responses = [getattr(response, "text", response) for response in sample["filtered_resps"]]
    kept["input"] = sample["arguments"][0]
    kept["target"] = str(sample["target"])
    kept["filtered_resps"] = responses[0] if len(responses) == 1 else responses
    return json.dumps(kept, default=str)


def _metric(results: Mapping[str, Any]) -> tuple[str, float]:
    """Return a task's first metric; ValueError if none is a number."""
    for name, value in results.items():
        metric, _, _filter = name.partition(",")
        if isinstance(value, (int, float)) and _filter and not metric.endswith("_stderr"):
            return metric, float(value)
    raise ValueError(f"the task has no metric that is a number, only {', '.join(results)}: choose another task")
