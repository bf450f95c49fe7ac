"""Models of real size with random weights, and a prompt for each; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn

from benchmarks import llava_models, qwen_models
from benchmarks.families import Family, Preparation, Prompt

SPREAD = 0.02  # standard deviation of the weights, at which activations stay far below float16's largest number


class Case(NamedTuple):
    """A model and one prompt for it.

    Attributes:
        model: The whole model on its device, in evaluation mode.
        inputs: Keyword arguments of `model.generate`.
        visual: How many visual tokens the prompt has.
        tokens: How many tokens it has, the visual ones included.
    """

    model: Any
    inputs: dict[str, Any]
    visual: int
    tokens: int


def build(backbone: str, device: str, dtype: torch.dtype, small: bool = False, to_split: bool = False) -> Case:
    """Build a backbone's model with seeded weights, and a prompt with one picture or video.

    No answer ends before its length limit.

    Args:
        backbone: One of BACKBONES, whose package the environment must have.
        device: Where the model is; on "meta" everything has its shape and no memory.
        dtype: The type of the weights.
        small: Whether to build a model of one or two million weights, for a CPU.
        to_split: Whether the decoder is to be split over several GPUs. Its layers are then on the CPU, and all have the
            numbers of the first one, in the same memory, so that the decoder may be larger than any memory.

    Raises:
        ValueError: The backbone is unknown.
    """
    if backbone not in _FAMILIES:
        raise ValueError(f"backbone={backbone!r}: allowed are {', '.join(BACKBONES)}")
    family, place = _FAMILIES[backbone], torch.device(device)
    with _seeded(place, 0), place, torch.no_grad():
        model = (_to_split(family.create, dtype, small) if to_split else _fill(family.create(dtype, small))).eval()
        return _case(family, model, family.prompt(model, dtype))


def resized(backbone: str, case: Case, what: str, size: int) -> Case:
    """Return a case of the same model whose prompt has another picture or video.

    Args:
        backbone: The backbone.
        case: Its case.
        what: Of what there shall be so many, one of `sizes_of`.
        size: How many.
    """
    family, model = _FAMILIES[backbone], case.model
    with _seeded(model.device, 0), model.device, torch.no_grad():
        return _case(family, model, family.sized[what](model, model.dtype, size))


def sizes_of(backbone: str) -> list[str]:
    """Return what can vary of a backbone's prompt, see `Family.sized`."""
    return [*_FAMILIES[backbone].sized]


def _case(family: Family, model: Any, prompt: Prompt) -> Case:
    ids = torch.tensor([prompt.ids])
    inputs = {family.argument: ids, "attention_mask": torch.ones_like(ids)} | prompt.visuals
    return Case(model, inputs, prompt.visual, prompt.tokens)


def batched(case: Case, batch: int) -> dict[str, Any]:
    """Return the inputs of `batch` copies of a case's prompt, of which all but the first have other random pixels."""

    def repeated(value: Any) -> Any:
        if isinstance(value, list):
            return value + [torch.randn_like(one) for _ in range(batch - 1) for one in value]
        if value.is_floating_point():
            return torch.cat([value, *(torch.randn_like(value) for _ in range(batch - 1))])
        return value.repeat(batch, 1)

    with _seeded(case.model.device, 1):
        return {name: repeated(value) for name, value in case.inputs.items()}


def preparation(backbone: str, case: Case) -> Preparation:
    """Return how prompts like that of a backbone's case come from pictures or clips on disk."""
    family = _FAMILIES[backbone]
    return family.preparation(case.model, case.inputs[family.argument][0].tolist())


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _to_split(create: Callable[[torch.dtype, bool], Any], dtype: torch.dtype, small: bool) -> Any:
    """Create a model whose decoder's layers share the first layer's memory on the CPU, see `build`."""
    with init_empty_weights(include_buffers=False):
        model = create(dtype, small)
    first, *others = model.get_decoder().layers
    empty = {part for layer in others for part in layer.modules()}
    for part in set(model.modules()) - empty:
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False))
    _fill(model)  # parameters without memory stay as they are
    first.to("cpu")
    for layer in others:
        for name, part in layer.named_modules():
            for kind, parameter in first.get_submodule(name).named_parameters(recurse=False):
                setattr(part, kind, nn.Parameter(parameter.data, requires_grad=False))
    return model


def _fill(model: Any) -> Any:
    """Give every parameter its value.

    The end token's row of the output head is zero, so its logit is never the largest.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith("weight") and parameter.dim() == 1:  # a norm's
            parameter.fill_(1)
        else:
            parameter.normal_(std=SPREAD)
    model.get_output_embeddings().weight[model.generation_config.eos_token_id].zero_()
    return model


SIZED = {"visual": qwen_models.qwen_picture_prompt, "frames": qwen_models.qwen_video_prompt}
QWEN = (qwen_models.qwen_prompt, "input_ids", qwen_models.qwen_preparation, SIZED)
_FAMILIES = {
    "llava": Family(llava_models.create_llava, llava_models.llava_prompt, "inputs", llava_models.llava_preparation),
    "video": Family(llava_models.create_video, llava_models.video_prompt, "inputs", llava_models.video_preparation),
    "qwen2": Family(qwen_models.create_qwen2, *QWEN),
    "qwen2-72b": Family(partial(qwen_models.create_qwen2, large=True), *QWEN),
    "qwen3": Family(qwen_models.create_qwen3, *QWEN),
}
BACKBONES = tuple(_FAMILIES)
