"""The arguments of lmms-eval's Qwen wrappers, read as people type them."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from strategy.distributed.processes import PLACEMENTS, find_device
from strategy.evaluation.batch_size import read_batch_size
from strategy.options import Read, flag, numbers, one_of, positive

ATTENTION = ("sdpa", "eager", "flash_attention_2")


def whole(least: int) -> Read:
    """Return a reader of a whole number from the least one up."""
    allowed = f"a whole number from {least} up"
    read_all = numbers(allowed, lambda number: number >= least, whole=True, single=True)

    def read(name: str, value: Any) -> int:
        found = read_all(name, value)
        if found is None:
            raise ValueError(f"{name}={value!r}: allowed is {allowed}")
        return int(found[0])

    return read


def text(name: str, value: Any) -> str:
    """Read a text, of which lmms-eval may have made a number."""
    if value is None:
        raise ValueError(f"{name}=None: allowed is a text")
    return str(value)


def attention(name: str, value: Any) -> str:
    """Read an attention implementation that can run here."""
    read = one_of(lambda: ATTENTION)(name, value)
    if read == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError(
            f"{name}={value!r}: allowed are sdpa and eager here: the package flash-attn or a GPU is missing"
        )
    return read


def flash_attention(name: str, value: Any) -> bool:
    """Read whether to use flash attention, where it can run."""
    read = flag(name, value)
    if read and not is_flash_attn_2_available():
        raise ValueError(f"{name}={value!r}: allowed is False here: the package flash-attn or a GPU is missing")
    return read


def readers(cell: int, frames: int) -> dict[str, Read]:
    """Return the reader of each argument that a wrapper takes as it comes.

    Args:
        cell: The pixels along the side of a visual token.
        frames: The fewest frames that a video may be read as.
    """
    return {
        "pretrained": text,
        "batch_size": read_batch_size,
        "max_length": whole(1),
        "min_pixels": whole(1),
        "max_pixels": whole(cell**2),
        "total_pixels": whole(cell**2),
        "max_num_frames": whole(frames),
        "fps": positive,
        "use_cache": flag,
        "interleave_visuals": flag,
        "enable_thinking": flag,
        "use_flash_attention_2": flash_attention,
        "attn_implementation": attention,
        "system_prompt": text,
        "reasoning_prompt": text,
    }


def read_arguments(
    given: Mapping[str, Any], defaults: Mapping[str, Any], readers: Mapping[str, Read]
) -> dict[str, Any]:
    """Return arguments as values that a wrapper can work with.

    Args:
        given: The arguments, as lmms-eval parsed them or as Python code gives them.
        defaults: The wrapper's defaults; an argument whose default is None may be None, also as text.
        readers: The reader of each argument; others stay as they are.

    Raises:
        ValueError: A value is not allowed; the message is one sentence.
    """
    read = dict(given)
    for name in readers.keys() & given.keys():
        value = given[name]
        if defaults.get(name, "") is None and str(value).strip().lower() in ("", "none"):
            read[name] = None
        else:
            read[name] = readers[name](name, value)
    pixels = {**defaults, **read}
    for name in ("max_pixels", "total_pixels"):
        if pixels.get(name) is not None and pixels[name] < pixels["min_pixels"]:
            raise ValueError(
                f"{name}={pixels[name]!r}: allowed is a whole number from min_pixels={pixels['min_pixels']} up"
            )
    return read


def choose_devices(device: Any, device_map: Any, own: str) -> tuple[str, Any]:
    """Return the device of a model's inputs, and where its weights are placed.

    Args:
        device: The device that was asked for, if any.
        device_map: The placement that was asked for, if any: a device, one of PLACEMENTS, or a dictionary.
        own: The device of this process.

    Raises:
        ValueError: There is no such device or placement, or the two contradict each other.
    """
    device, device_map = (
        None if str(given).strip().lower() in ("", "none") else given for given in (device, device_map)
    )
    asked = None if device_map is None or isinstance(device_map, dict) or device_map in PLACEMENTS else device_map
    if asked is not None:
        try:
            mapped = find_device(asked)
        except ValueError as error:
            raise ValueError(
                f"device_map={device_map!r}: allowed are {', '.join(PLACEMENTS)}, or a device that is here: cpu, "
                "cuda, ..."
            ) from error
        if device is not None and not _same(find_device(device), mapped):
            raise ValueError(f"device_map={device_map!r}: allowed is what device={device!r} says, or one of the two")
        device = mapped
    place = find_device(own if device is None else device)
    name = "cpu" if place.type == "cpu" else str(place)
    spread = device_map in PLACEMENTS and place.type == "cuda"
    return name, device_map if spread or isinstance(device_map, dict) else name


def _same(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)
