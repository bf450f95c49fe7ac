"""The lmms-eval model `qwen3_vl_vtr`: Qwen3-VL, pruned by any strategy, in lmms-eval's simple and chat forms."""

from lmms_eval.models.chat.qwen3_vl import Qwen3_VL as Qwen3_VLChat
from lmms_eval.models.simple.qwen3_vl import Qwen3_VL

import qwen3_vl_vtr  # noqa: F401  registers the backbone
from qwen_vl_vtr.qwen3_lmms_model import PrunedQwen3


class Qwen3VLVTR(PrunedQwen3, Qwen3_VL):
    """lmms-eval's Qwen3-VL with visual token pruning."""


class Qwen3VLChatVTR(PrunedQwen3, Qwen3_VLChat):
    """lmms-eval's Qwen3-VL with visual token pruning, for tasks that give their questions as messages."""
