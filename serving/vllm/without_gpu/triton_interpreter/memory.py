"""Memory that is not pinned: a torch that is built for CUDA raises where memory is pinned without a driver."""

from collections.abc import Sequence

import torch


def register() -> None:
    """Let Model Runner V2 use ordinary memory where it asks for pinned memory; vLLM calls this in its processes."""
    if torch.cuda.is_available():
        return
    from vllm.v1.worker.gpu.buffer_utils import UvaBuffer
    from vllm.v1.worker.gpu.mm import encoder_runner

    def ordinary(self: UvaBuffer, size: int | Sequence[int], dtype: torch.dtype) -> None:
        self.cpu = torch.zeros(size, dtype=dtype)
        self.np, self.uva = self.cpu.numpy(), self.cpu

    UvaBuffer.__init__ = ordinary
    batch = encoder_runner.group_and_batch_mm_kwargs
    encoder_runner.group_and_batch_mm_kwargs = lambda *args, **kwargs: batch(*args, **kwargs | {"pin_memory": False})
    torch.Tensor.pin_memory = lambda tensor, *args: tensor  # type: ignore[method-assign]
