"""The compiler of the backend, which Triton wants to exist and never calls when it interprets."""

from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class InterpretingCompiler(BaseBackend):
    """Compiles nothing."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise NotImplementedError("set TRITON_INTERPRET=1: this backend compiles no kernels")

    def add_stages(self, stages: dict[str, Any], options: object, language: Any = None) -> None:
        raise NotImplementedError("set TRITON_INTERPRET=1: this backend compiles no kernels")

    def load_dialects(self, context: Any) -> None:
        raise NotImplementedError("set TRITON_INTERPRET=1: this backend compiles no kernels")

    def get_module_map(self) -> dict[str, Any]:
        return {}
