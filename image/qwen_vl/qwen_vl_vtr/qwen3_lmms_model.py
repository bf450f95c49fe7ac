"""The mixin that adds pruning to lmms-eval's own wrappers of Qwen3-VL."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from qwen_vl_vtr.arguments import readers
from qwen_vl_vtr.lmms_eval_model import PrunedQwen

# lmms-eval's wrapper takes a checkpoint for a mixture of experts if its path matches.
EXPERTS_PATH = re.compile(r"A\d+B")


class PrunedQwen3(PrunedQwen):
    """A mixin for the wrappers of Qwen3-VL, in both forms."""

    model_id = "qwen3_vl_vtr"
    model_classes: ClassVar = {
        "qwen3_vl": Qwen3VLForConditionalGeneration,
        "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
    }
    expert_classes: tuple[type, ...] = (Qwen3VLMoeForConditionalGeneration,)
    # As published; transformers 5 saves them the other way round.
    transposed = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    readers: ClassVar = readers(cell=32, frames=2)  # a video is read in pairs of frames

    def folder_for_wrapper(self, folder: Path, model_class: Any) -> Path:
        experts = model_class in self.expert_classes
        if bool(EXPERTS_PATH.search(str(folder))) == experts:
            return folder
        # Weights that are left on the disk are read by this path later on.
        self._links = TemporaryDirectory(prefix="qwen3_vl_vtr_")
        link = Path(self._links.name) / ("A0B" if experts else "dense")
        link.symlink_to(folder.resolve(), target_is_directory=True)
        if bool(EXPERTS_PATH.search(str(link))) != experts:
            raise ValueError(f"{folder}: set TMPDIR to a folder whose path does not match {EXPERTS_PATH.pattern}")
        return link

    def readable_frames(self, count: int) -> int:
        if self.fps is not None or self.total_pixels is not None:
            return super().readable_frames(count)
        # The wrapper asks for a number of frames that is rounded to an even one: the chat form for the largest number
        # that is allowed, the simple form for no more than there are.
        asked = min(count, int(self.max_num_frames)) if self.is_simple else int(self.max_num_frames)
        return max(count, 2 * round(asked / 2), 2)
