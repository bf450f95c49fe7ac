"""The manifest by which lmms-eval finds the model `llava_vtr`; the package's entry point names it."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("llava_vtr", simple_class_path="llava.lmms_eval_model.LlavaVTR")
