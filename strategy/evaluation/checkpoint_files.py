"""The files of a checkpoint: which of them transformers loads, and which tensors they hold.

Other files may lie beside them, such as those of a training run; transformers ignores these, and so does this module.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

# In the order in which transformers looks for them: it loads the first that is there.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# The JSON that transformers reads besides.
SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
DOWNLOADED = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.bin"]
NAMED = 5  # so many tensors are named by an error

Shapes = dict[str, tuple[int, ...]]
"""The shapes of tensors, by name."""


def find_folder(path: str, cache_dir: str | None = None) -> Path:
    """Return a folder as it is, or download a repository of the hub; raise ValueError if the path is neither."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    if str(path) and Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=DOWNLOADED, cache_dir=cache_dir))
    except Exception as error:
        raise ValueError(f"{path!r} is not a folder, and the hub did not give it ({type(error).__name__})") from error


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise ValueError that names the file if it is missing or damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: missing, or not JSON of names and values ({error})") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what config.json says; raise ValueError that names a file of SETTINGS that is damaged."""
    for name in SETTINGS:
        if (folder / name).exists():
            read_json(folder / name)
    return read_json(folder / "config.json")


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Return the files that transformers loads from a folder, each with the tensors that an index finds in it, if any.

    Raises:
        ValueError: There are none, or those that an index names are not there.
    """
    first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise ValueError(f"{folder}: no weights in this folder, want one of {', '.join(WEIGHTS)}")
    if first.suffix != ".json":
        return {first: None}
    places = read_json(first).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{first}: want a weight_map with the file of each tensor")
    files: dict[Path, list[str] | None] = {}
    for place in sorted(set(places.values())):
        if not (folder / place).is_file():
            raise ValueError(
                f"{folder / place}: missing, and {first.name} names it: the checkpoint is incomplete, or the index is "
                "a leftover to be deleted"
            )
        files[folder / place] = [name for name in places if places[name] == place]
    return files


def weight_shapes(folder: Path) -> Shapes:
    """Return the shapes of all weights that transformers loads from a folder, without reading the weights.

    Raises:
        ValueError: A file, which the message names, is missing, cut off, or holds more than tensors; or the index of
            several files says otherwise than these.
    """
    shapes: Shapes = {}
    files = weight_files(folder)
    placed = {name: file for file, names in files.items() for name in names or ()}
    for file, names in files.items():
        inside = _read_shapes(file)
        if names is None:
            return inside
        lost = sorted(set(names) - set(inside))
        twice = sorted(name for name in inside if placed.get(name, file) != file)
        if lost or twice:
            raise ValueError(
                f"{file}: other tensors than its index says: "
                + _listed({"missing": lost, "in another file by the index": twice})
            )
        shapes |= {name: inside[name] for name in names}
    return shapes


def misfit(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """Return what is wrong with the tensors found, compared with those that a model wants; nothing if they fit."""
    faults: dict[str, Sequence[str]] = {
        "missing": sorted(set(wanted) - set(found)),
        "left over": sorted(set(found) - set(wanted)),
    }
    shapes = [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in sorted(wanted.items())
        if found.get(name, shape) != shape
    ]
    more = [f"{len(shapes) - NAMED} more of another shape"] if len(shapes) > NAMED else []
    return ", ".join(filter(None, [_listed(faults), *shapes[:NAMED], *more]))


def _listed(faults: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(
        f"{kind} {list(names[:NAMED])}" + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        for kind, names in faults.items()
        if names
    )


def _read_shapes(file: Path) -> Shapes:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        tensors = torch.load(file, map_location="meta", weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise RuntimeError("want names with tensors")
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: damaged, cut off, or more than tensors ({reason})") from error
