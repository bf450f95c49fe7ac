"""The vision-language models of today on stock transformers, with visual token pruning."""

from current_vlm import gemma3 as _gemma3  # noqa: F401  importing them registers the adapters
from current_vlm import internvl as _internvl  # noqa: F401
from current_vlm import llava as _llava  # noqa: F401
from current_vlm import paligemma as _paligemma  # noqa: F401
from current_vlm import qwen as _qwen  # noqa: F401
