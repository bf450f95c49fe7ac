"""Checking a checkpoint of a Qwen-VL against the model that it is loaded into."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from strategy.evaluation.checkpoint_files import Shapes, misfit, read_settings, weight_shapes

# Buffers that older checkpoints hold although every model computes them itself.
DERIVED = ".inv_freq"
# What transformers raises for a configuration with values of the wrong kind.
CONFIG_ERRORS = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)


Rename = Callable[[Any, Shapes], Shapes]
"""Returns shapes of a checkpoint under the names of a model's tensors."""


def check_checkpoint(
    folder: Path, model_classes: Mapping[str, Any], transposed: tuple[str, ...] = (), rename: Rename | None = None
) -> Any:
    """Return the class of the model whose weights are in a folder.

    transformers initialises at random what has no weights, and starts to build any number of layers. Here names and
    shapes are compared first; no weight is read, and no memory is allocated for the model.

    Args:
        folder: The folder.
        model_classes: The classes that are allowed, by the `model_type` of config.json.
        transposed: How the names of weights end that a checkpoint may hold with their last two dimensions swapped.
        rename: Gives the tensors their names; the default knows what a model class itself says of older names.

    Raises:
        ValueError: The checkpoint is of another kind, or damaged, or its weights are not those of its model.
    """
    config = read_settings(folder)
    kind = config.get("model_type")
    if "auto_map" in config:
        raise ValueError(f"{folder} brings its own code (auto_map in config.json), which is not run")
    if kind not in tuple(model_classes):
        raise ValueError(f"{folder}: model_type={kind!r} in config.json: want {' or '.join(map(repr, model_classes))}")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: LoRA checkpoints are not supported, merge them first")
    for name in ("quantization_config", "transformers_weights"):
        if config.get(name) is not None:
            raise ValueError(f"{folder}: {name} in config.json is not supported; want plain weights")
    shapes = {name: shape for name, shape in weight_shapes(folder).items() if not name.endswith(DERIVED)}
    model_class = model_classes[kind]
    model = _build(folder, model_class, config, len(shapes))
    found = rename(model, shapes) if rename else _renamed(folder, model_class, shapes)
    wanted = _wanted(model, found)
    for name, shape in found.items():
        if name.endswith(transposed) and wanted.get(name) == (*shape[:-2], *shape[:-3:-1]):
            found[name] = wanted[name]
    fault = misfit(found, wanted)
    if fault:
        raise ValueError(f"{folder}: the weights do not fit config.json: {fault}")
    return model_class


def _build(folder: Path, model_class: Any, config: Mapping[str, Any], count: int) -> Any:
    """Return a model without memory; raise ValueError if it has more layers than there are tensors, or none exists."""
    text, vision = (config.get(name) for name in ("text_config", "vision_config"))
    parts = {"num_hidden_layers": text if isinstance(text, dict) else config, "depth": vision}
    for name, part in parts.items():
        depth = part.get(name) if isinstance(part, dict) else None
        if depth is not None and not (isinstance(depth, int) and 0 < depth <= count):
            raise ValueError(f"{folder}: config.json says {name}={depth!r}, but there are {count} tensors in all")
    try:
        with torch.device("meta"):
            return model_class(model_class.config_class.from_dict(config))
    except (RuntimeError, ValueError, *CONFIG_ERRORS) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder}: there is no model of such a configuration ({reason})") from error


def _renamed(folder: Path, model_class: Any, shapes: Shapes) -> Shapes:
    """Return shapes under the names that transformers gives to the tensors of older checkpoints."""
    found: Shapes = {}
    for name, shape in shapes.items():
        for pattern, replacement in getattr(model_class, "_checkpoint_conversion_mapping", {}).items():
            new, count = re.subn(pattern, replacement, name)
            if count:
                break
        else:
            new = name
        if new in found:
            raise ValueError(f"{folder}: there are two tensors for {new}, under an old name and a new one")
        found[new] = shape
    return found


def _wanted(model: Any, found: Shapes) -> Shapes:
    """Return the shapes of a model's tensors, less those that are copied from others that were found."""
    tensors = model.state_dict(keep_vars=True)
    held = {id(tensor) for name, tensor in tensors.items() if name in found}
    copies = {name for name in model._tied_weights_keys or () if id(tensors.get(name)) in held}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name in found or name not in copies}
