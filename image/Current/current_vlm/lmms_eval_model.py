"""The lmms-eval models of this package: lmms-eval's own wrappers, pruned by any strategy."""

import warnings
from pathlib import Path
from typing import Any, ClassVar

from lmms_eval.models.chat.internvl_hf import InternVLHf
from lmms_eval.models.chat.llava_hf import LlavaHf as LlavaHfChat
from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL as Qwen2_5_VLChat
from lmms_eval.models.chat.qwen3_5 import Qwen3_5 as Qwen3_5Chat
from lmms_eval.models.chat.qwen3_vl import Qwen3_VL as Qwen3_VLChat
from lmms_eval.models.simple.gemma3 import Gemma3
from lmms_eval.models.simple.llava_hf import LlavaHf
from lmms_eval.models.simple.qwen2_5_vl import Qwen2_5_VL
from lmms_eval.models.simple.qwen3_5 import Qwen3_5
from lmms_eval.models.simple.qwen3_vl import Qwen3_VL
from transformers import (
    Gemma3ForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
)

import current_vlm  # noqa: F401  registers the backbones
from current_vlm.checkpoint_names import renamed
from qwen_vl_vtr.arguments import readers, whole
from qwen_vl_vtr.lmms_eval_model import PrunedQwen, PrunedWrapper
from qwen_vl_vtr.qwen3_lmms_model import PrunedQwen3
from strategy.evaluation.batch_size import AUTO
from strategy.options import Read, numbers


def one(name: str, value: Any) -> int | str:
    """Read a batch size, for a wrapper that answers questions one by one."""
    if str(value).strip().lower() == AUTO:
        return AUTO
    allowed = "1 or auto, which is 1 here, since lmms-eval's wrapper answers one question at a time"
    found = numbers(allowed, lambda n: n == 1, whole=True)(name, value)
    return int(found[0]) if found else 1


QWEN = readers(cell=28, frames=2)
PLAIN: dict[str, Read] = {name: QWEN[name] for name in ("pretrained", "use_cache", "attn_implementation")}


class Qwen25VLVTR(PrunedQwen, Qwen2_5_VL):
    """lmms-eval's Qwen2.5-VL with visual token pruning."""

    model_id = "qwen2_5_vl_vtr"
    model_classes: ClassVar = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}
    rename = renamed
    readers: ClassVar = QWEN


class Qwen25VLChatVTR(Qwen25VLVTR, Qwen2_5_VLChat):
    """The same for tasks that give their questions as messages."""


class Qwen3VLVTR(PrunedQwen3, Qwen3_VL):
    """lmms-eval's Qwen3-VL with visual token pruning."""

    rename = renamed


class Qwen3VLChatVTR(Qwen3VLVTR, Qwen3_VLChat):
    """The same for tasks that give their questions as messages."""


class Qwen35VTR(PrunedQwen3, Qwen3_5):
    """lmms-eval's Qwen3.5 with visual token pruning."""

    model_id = "qwen3_5_vtr"
    model_classes: ClassVar = {
        "qwen3_5": Qwen3_5ForConditionalGeneration,
        "qwen3_5_moe": Qwen3_5MoeForConditionalGeneration,
    }
    expert_classes = (Qwen3_5MoeForConditionalGeneration,)
    rename = renamed

    def _strip_thinking(self, answer: str) -> Any:
        """Strip what stands before `</think>`, as the wrapper does, which leaves nothing where the mark is missing."""
        stripped = super()._strip_thinking(answer)
        if answer and not stripped:
            warnings.warn(
                f"{self.model_id}: lmms-eval's wrapper leaves nothing of an answer that holds no </think>: "
                "raise max_new_tokens, or give enable_thinking=False",
                stacklevel=2,
            )
        return stripped


class Qwen35ChatVTR(Qwen35VTR, Qwen3_5Chat):
    """The same for tasks that give their questions as messages."""


class InternVLVTR(PrunedWrapper, InternVLHf):
    """lmms-eval's InternVL in the format of transformers, with visual token pruning; it takes messages only."""

    model_id = "internvl_vtr"
    model_classes: ClassVar = {"internvl": InternVLForConditionalGeneration}
    rename = renamed
    catches_errors = True
    sorts_messages = False
    largest_batch = 1
    readers: ClassVar = PLAIN | {"batch_size": one, "min_patches": whole(1), "max_patches": whole(1)}


class Gemma3VTR(PrunedWrapper, Gemma3):
    """lmms-eval's Gemma 3 with visual token pruning."""

    model_id = "gemma3_vtr"
    model_classes: ClassVar = {"gemma3": Gemma3ForConditionalGeneration}
    rename = renamed
    readers: ClassVar = PLAIN | {name: QWEN[name] for name in ("batch_size", "system_prompt", "interleave_visuals")}


class LlavaHFVTR(PrunedWrapper, LlavaHf):
    """lmms-eval's LLaVA-1.5 in the format of transformers, with visual token pruning."""

    model_id = "llava_hf_vtr"
    model_classes: ClassVar = {"llava": LlavaForConditionalGeneration}
    rename = renamed
    catches_errors = True
    sorts_messages = False
    largest_batch = 1
    readers: ClassVar = PLAIN | {"batch_size": one}

    @property
    def processor(self) -> Any:
        """Return what the wrapper has under another name."""
        return self._image_processor

    def prepare_video(self, file: Path) -> str:
        raise ValueError(f"{file} is no picture, and {self.model_id} takes pictures only")


class LlavaHFChatVTR(LlavaHFVTR, LlavaHfChat):
    """The same for tasks that give their questions as messages."""


class LlavaNextVTR(LlavaHFVTR):
    """lmms-eval's LLaVA-NeXT with visual token pruning."""

    model_id = "llava_next_vtr"
    model_classes: ClassVar = {"llava_next": LlavaNextForConditionalGeneration}


class LlavaNextChatVTR(LlavaNextVTR, LlavaHfChat):
    """The same for tasks that give their questions as messages."""


class LlavaOnevisionVTR(LlavaHFVTR):
    """lmms-eval's LLaVA-OneVision with visual token pruning."""

    model_id = "llava_onevision_vtr"
    model_classes: ClassVar = {"llava_onevision": LlavaOnevisionForConditionalGeneration}

    def prepare_video(self, file: Path) -> str:
        return PrunedWrapper.prepare_video(self, file)


class LlavaOnevisionChatVTR(LlavaOnevisionVTR, LlavaHfChat):
    """The same for tasks that give their questions as messages."""
