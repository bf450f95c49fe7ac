"""The lmms-eval model `qwen3_vl_vtr`: Qwen3-VL, pruned by any strategy, in lmms-eval's simple and chat forms."""

from lmms_eval.models.chat.qwen3_vl import Qwen3_VL as Qwen3_VLChat
from lmms_eval.models.simple.qwen3_vl import Qwen3_VL

import qwen3_vl_vtr  # noqa: F401  registers the backbone
from qwen_vl_vtr.lmms_eval_model import PrunedQwen


class PrunedQwen3(PrunedQwen):
    """What the simple and the chat form have in common."""

    def readable_frames(self, count: int) -> int:
        if self.fps is not None or self.total_pixels is not None:
            return super().readable_frames(count)
        # The wrapper asks for a number of frames that is rounded to an even one: the chat form for the largest number
        # that is allowed, the simple form for no more than there are.
        asked = min(count, int(self.max_num_frames)) if self.is_simple else int(self.max_num_frames)
        return max(count, 2 * round(asked / 2), 2)


class Qwen3VLVTR(PrunedQwen3, Qwen3_VL):
    """lmms-eval's Qwen3-VL with visual token pruning."""

    model_id = "qwen3_vl_vtr"


class Qwen3VLChatVTR(PrunedQwen3, Qwen3_VLChat):
    """lmms-eval's Qwen3-VL with visual token pruning, for tasks that give their questions as messages."""

    model_id = "qwen3_vl_vtr"
