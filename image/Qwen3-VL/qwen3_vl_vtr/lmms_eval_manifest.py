"""The manifest by which lmms-eval finds the model `qwen3_vl_vtr`; the package's entry point names it."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(
    "qwen3_vl_vtr",
    simple_class_path="qwen3_vl_vtr.lmms_eval_model.Qwen3VLVTR",
    chat_class_path="qwen3_vl_vtr.lmms_eval_model.Qwen3VLChatVTR",
)
