"""How lmms-eval finds the model `llava_vtr`: this is what the package's entry point names."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("llava_vtr", simple_class_path="llava.lmms_eval_model.LlavaVTR")
