"""The manifests by which lmms-eval finds the models of this package; the package's entry points name them."""

from lmms_eval.models.registry_v2 import ModelManifest

MODULE = "current_vlm.lmms_eval_model"

QWEN2_5_VL = ModelManifest(
    "qwen2_5_vl_vtr", simple_class_path=f"{MODULE}.Qwen25VLVTR", chat_class_path=f"{MODULE}.Qwen25VLChatVTR"
)
QWEN3_VL = ModelManifest(
    "qwen3_vl_vtr", simple_class_path=f"{MODULE}.Qwen3VLVTR", chat_class_path=f"{MODULE}.Qwen3VLChatVTR"
)
QWEN3_5 = ModelManifest(
    "qwen3_5_vtr", simple_class_path=f"{MODULE}.Qwen35VTR", chat_class_path=f"{MODULE}.Qwen35ChatVTR"
)
INTERNVL = ModelManifest("internvl_vtr", chat_class_path=f"{MODULE}.InternVLVTR")
GEMMA3 = ModelManifest("gemma3_vtr", simple_class_path=f"{MODULE}.Gemma3VTR")
LLAVA_HF = ModelManifest(
    "llava_hf_vtr", simple_class_path=f"{MODULE}.LlavaHFVTR", chat_class_path=f"{MODULE}.LlavaHFChatVTR"
)
LLAVA_NEXT = ModelManifest(
    "llava_next_vtr", simple_class_path=f"{MODULE}.LlavaNextVTR", chat_class_path=f"{MODULE}.LlavaNextChatVTR"
)
LLAVA_ONEVISION = ModelManifest(
    "llava_onevision_vtr",
    simple_class_path=f"{MODULE}.LlavaOnevisionVTR",
    chat_class_path=f"{MODULE}.LlavaOnevisionChatVTR",
)
