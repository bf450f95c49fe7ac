"""What pruning adds to lmms-eval's own wrappers of the Qwen models."""

import inspect
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from loguru import logger
from safetensors import SafetensorError
from transformers import PretrainedConfig

import strategy
from strategy.config import check_names, field_names


class PrunedQwen:
    """Stands before one of lmms-eval's wrappers among the bases of a class.

    Takes the arguments of that wrapper and the fields of `strategy.VTRConfig`, these also with `vtr_` in
    front. The device is CUDA if there is one, else the CPU, where the model runs in float32. Anything
    wrong with the arguments or with the checkpoint ends the run with one sentence.
    """

    model_id: str

    def __init__(self, **arguments: Any) -> None:
        try:
            config = strategy.VTRConfig.take(arguments)
            stock = [
                name for name, p in inspect.signature(super().__init__).parameters.items() if p.kind != p.VAR_KEYWORD
            ]
            check_names(arguments, (*stock, *field_names()))
            arguments.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
            arguments.setdefault("device_map", arguments["device"])
            if "pretrained" in arguments:
                _refuse_own_code(arguments["pretrained"])
            super().__init__(**arguments)
            if self.model.device.type == "cpu":
                # The wrappers load half precision, which most CPUs only emulate.
                self.model.float()
            self.record = strategy.attach(self.model, config)
        except (ValueError, OSError) as error:
            # lmms-eval would bury this under its own traceback.
            raise SystemExit(f"{self.model_id}: {error}") from None
        except SafetensorError as error:
            raise SystemExit(f"{self.model_id}: {arguments['pretrained']}: broken weights ({error})") from None

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        """Answer each request, in order."""
        answers = super().generate_until(requests)
        logger.info(f"{self.model_id} {self.record.summary()}")
        return answers


def _refuse_own_code(pretrained: str) -> None:
    # lmms-eval's Qwen3-VL wrapper would run code that comes with a checkpoint.
    if "auto_map" in PretrainedConfig.get_config_dict(pretrained)[0]:
        raise ValueError(f"{pretrained} brings its own code (auto_map in config.json), which is not run")
