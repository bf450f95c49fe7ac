"""What pruning adds to lmms-eval's own wrappers of the Qwen models."""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import Instance
from loguru import logger
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

import strategy
from strategy.config import field_names
from strategy.distributed import processes, tensor_parallel, zero
from strategy.evaluation.lmms_model import Evaluated
from strategy.evaluation.unreadable_images import answer_readable
from strategy.options import check_names

# What transformers raises for a configuration with values of the wrong kind.
MISFITS = (TypeError, AttributeError, KeyError, ZeroDivisionError)


class PrunedQwen(Evaluated):
    """Stands before one of lmms-eval's wrappers among the bases of a class.

    Takes the arguments of that wrapper and the fields of `strategy.VTRConfig`, these also with `vtr_` in
    front. The device is CUDA if there is one, else the CPU, where the model runs in float32. Anything
    wrong with the arguments or with the checkpoint ends the run with one sentence.
    """

    def __init__(self, **arguments: Any) -> None:
        try:
            config = strategy.VTRConfig.take(arguments)
            stock = [
                name for name, p in inspect.signature(super().__init__).parameters.items() if p.kind != p.VAR_KEYWORD
            ]
            check_names(arguments, (*stock, "tensor_parallel", "zero_stage", "resume_folder", *field_names()))
            shares = tensor_parallel.parse_tp_size(arguments.pop("tensor_parallel", 1))
            sharded = zero.parse_zero_stage(arguments.pop("zero_stage", 0), shares)
            processes.rank_timeout()
            self.take_up(config, arguments, shares)
            arguments.pop("resume_folder", None)
            place = processes.take_device()
            if shares > 1 or sharded:
                # The whole of what is to be split may be too large for a GPU.
                arguments |= {"device": place, "device_map": "cpu"}
            device = processes.find_device(arguments.get("device") or place)
            arguments["device"] = "cpu" if device.type == "cpu" else str(device)
            arguments.setdefault("device_map", arguments["device"])
            if "pretrained" in arguments:
                check_checkpoint(arguments["pretrained"])
            with alone():
                super().__init__(**arguments)
            # Answers follow the prompt, so what fills it up comes before; the wrappers leave that to the checkpoint.
            self.tokenizer.padding_side = self.processor.tokenizer.padding_side = "left"
            if self.device.type == "cpu":
                # The wrappers load half precision, which most CPUs only emulate.
                self.model.float()
            self.share_out(self.model, self.model.model.language_model, config, shares, sharded)
        except (ValueError, OSError, ImportError) as error:
            # lmms-eval would bury this under its own traceback.
            raise SystemExit(f"{self.model_id}: {error}") from None
        except torch.cuda.OutOfMemoryError:
            raise
        except (SafetensorError, UnpicklingError, RuntimeError, *MISFITS) as error:
            reason, named = " ".join(str(error).split()), arguments.get("pretrained", "the default checkpoint")
            raise SystemExit(f"{self.model_id}: {named}: broken weights or configuration ({reason})") from None

    def as_seen(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Pictures as the grids of their tokens cover them: whole."""
        return [picture.convert("RGB") for picture in pictures]

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        """Answer each request, in order; one with an unreadable picture is named and answered with nothing."""
        return self.answered(requests, self._by_task, "")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        """Answer tasks of several rounds, if the wrapper does: each process its own, and nothing is kept of them."""
        if self.group or self.shards or self.journal:
            raise SystemExit(
                f"{self.model_id}: tasks of several rounds do not go with tensor_parallel, zero_stage or resume_folder"
            )
        return super().generate_until_multi_round(requests)

    def _by_task(self, requests: list[Instance]) -> list[Any]:
        def tell(told: str) -> None:
            logger.error(f"{self.model_id}: {told}")

        # The wrappers take a whole batch for the first question's task.
        places: dict[tuple[str, str], list[int]] = {}
        for number, request in enumerate(requests):
            places.setdefault(tuple(request.args[-2:]), []).append(number)
        answers: list[Any] = [""] * len(requests)
        for numbers in places.values():
            mine = answer_readable(self, [requests[n] for n in numbers], super().generate_until, "", tell)
            for number, said in zip(numbers, mine, strict=True):
                answers[number] = said
        return answers


@contextmanager
def alone() -> Iterator[None]:
    """Let the wrappers take this process for the only one.

    Among several they want GPUs, whose place `device` tells already, and that is all that they would do.
    """
    state = PartialState()
    count, state.num_processes = state.num_processes, 1
    try:
        yield
    finally:
        state.num_processes = count


def check_checkpoint(pretrained: str) -> None:
    """Refuse a checkpoint that brings its own code, or a folder without weights for all its layers.

    Raises ValueError. transformers would leave random what it has no weights for, and begin to build any
    number of layers; lmms-eval's Qwen3-VL wrapper would run the code.
    """
    config = PretrainedConfig.get_config_dict(pretrained)[0]
    if "auto_map" in config:
        raise ValueError(f"{pretrained} brings its own code (auto_map in config.json), which is not run")
    names = [name for file in Path(pretrained).glob("*.safetensors") for name in _names(file)]
    if not names:
        return
    depths = {
        "layers": config.get("text_config", config).get("num_hidden_layers"),
        "blocks": config.get("vision_config", {}).get("depth"),
    }
    for kind, depth in depths.items():
        found = {int(match[1]) for name in names if (match := re.search(rf"\b{kind}\.(\d+)\.", name))}
        if depth is not None and (len(found), max(found, default=-1) + 1) != (depth, depth):
            raise ValueError(f"{pretrained}: config.json says {depth} {kind}, but there are weights for {len(found)}")


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())
