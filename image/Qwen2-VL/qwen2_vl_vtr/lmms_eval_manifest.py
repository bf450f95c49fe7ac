"""The manifest by which lmms-eval finds the model `qwen2_vl_vtr`; the package's entry point names it."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("qwen2_vl_vtr", simple_class_path="qwen2_vl_vtr.lmms_eval_model.Qwen2VLVTR")
