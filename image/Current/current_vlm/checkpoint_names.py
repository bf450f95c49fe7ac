"""The names that transformers 5.24 gives to the tensors of published checkpoints."""

from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from strategy.evaluation.checkpoint_files import Shapes


def renamed(model: Any, shapes: Shapes) -> Shapes:
    """Return shapes of a checkpoint under the names of a model's tensors.

    A tensor that transformers computes of others, such as the stack of all experts, is taken for what it will be.

    Args:
        model: The model, on the meta device.
        shapes: The shapes, by the names in the files.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    wanted, found = model.state_dict(), {}
    for name, shape in shapes.items():
        new, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        found[new] = tuple(wanted[new].shape) if converted is not None and new in wanted else shape
    return found
