"""The lmms-eval model `qwen2_vl_vtr`: Qwen2-VL, pruned by any strategy."""

from typing import ClassVar

from lmms_eval.models.simple.qwen2_vl import Qwen2_VL
from transformers import Qwen2VLForConditionalGeneration

import qwen2_vl_vtr  # noqa: F401  registers the backbone
from qwen_vl_vtr.arguments import readers
from qwen_vl_vtr.lmms_eval_model import PrunedQwen


class Qwen2VLVTR(PrunedQwen, Qwen2_VL):
    """lmms-eval's Qwen2-VL with visual token pruning."""

    model_id = "qwen2_vl_vtr"
    model_classes: ClassVar = {"qwen2_vl": Qwen2VLForConditionalGeneration}
    readers: ClassVar = readers(cell=28, frames=1)
