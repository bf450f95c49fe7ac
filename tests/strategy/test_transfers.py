"""Copies between host and GPU."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from strategy.kernels.transfers import host_copy, pinned, read_early, remembering, tensor_on, to_device

CPU = torch.device("cpu")


@pytest.fixture
def on_gpu():
    """Tensors without values stand for those of a GPU, as there is none in CI."""
    with FakeTensorMode():
        yield torch.zeros(3, device="cuda")


def test_tensors_of_the_cpu_are_not_copied():
    tensor = torch.arange(3)
    assert host_copy(tensor) is tensor
    assert to_device(tensor, CPU) is tensor
    assert tensor_on(CPU, [1, 2], torch.int32).equal(torch.tensor([1, 2], dtype=torch.int32))


def test_an_expanded_tensor_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    stock, asked = torch.empty, []

    def empty(*args, pin_memory, **options):  # without a GPU there is no memory to pin
        asked.append(pin_memory)
        return stock(*args, **options)

    monkeypatch.setattr(torch, "empty", empty)
    assert pinned(torch.arange(3.0).expand(2, 3)).equal(torch.tensor([[0.0, 1, 2], [0, 1, 2]]))
    assert asked == [True]


def test_host_copies_are_those_of_the_last_change(on_gpu):
    with remembering():
        first = host_copy(on_gpu)
        assert first.device == CPU
        with remembering():
            assert host_copy(on_gpu) is first
        assert host_copy(on_gpu) is first
        on_gpu += 1
        second = host_copy(on_gpu)
        assert second is not first
        assert host_copy(on_gpu) is second
        assert host_copy(on_gpu.clone()) is not second


def test_nothing_is_remembered_behind_the_outermost_with(on_gpu):
    assert host_copy(on_gpu) is not host_copy(on_gpu)
    with remembering():
        first = host_copy(on_gpu)
    with remembering():
        assert host_copy(on_gpu) is not first


def test_a_tensor_is_read_early_where_its_copy_is_remembered(on_gpu, monkeypatch):
    read = []
    monkeypatch.setattr("strategy.kernels.transfers.host_copy", read.append)
    read_early(on_gpu)
    assert read == []
    with remembering():
        read_early(on_gpu)
    assert len(read) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("inference", [False, True])
def test_gpu_copies_have_the_values(inference):
    with torch.inference_mode(inference), remembering():
        moved = tensor_on(torch.device("cuda"), [[1, 2], [3, 4]])
        assert host_copy(moved).tolist() == [[1, 2], [3, 4]]
        moved[0] = 5
        assert host_copy(moved).tolist() == [[5, 5], [3, 4]]
