"""Copies between host and GPU."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from strategy.kernels.transfers import host_copy, tensor_on, to_device

CPU = torch.device("cpu")


def test_tensors_of_the_cpu_are_not_copied():
    tensor = torch.arange(3)
    assert host_copy(tensor) is tensor
    assert to_device(tensor, CPU) is tensor
    assert tensor_on(CPU, [1, 2], torch.int32).equal(torch.tensor([1, 2], dtype=torch.int32))


def test_host_copies_are_those_of_the_last_change():
    """Tensors without values stand for those of a GPU, as there is none in CI."""
    with FakeTensorMode():
        tensor = torch.zeros(3, device="cuda")
        first = host_copy(tensor)
        assert first.device == CPU
        assert host_copy(tensor) is first
        tensor += 1
        second = host_copy(tensor)
        assert second is not first
        assert host_copy(tensor) is second
        assert host_copy(tensor.clone()) is not second


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("inference", [False, True])
def test_gpu_copies_have_the_values(inference):
    with torch.inference_mode(inference):
        moved = tensor_on(torch.device("cuda"), [[1, 2], [3, 4]])
        assert host_copy(moved).tolist() == [[1, 2], [3, 4]]
        moved[0] = 5
        assert host_copy(moved).tolist() == [[5, 5], [3, 4]]
