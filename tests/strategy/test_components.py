"""Principal components against torch's singular value decomposition."""

import pytest
import torch

from strategy.kernels.components import orthonormal, principal_axes


@pytest.mark.parametrize(("rows", "columns", "count"), [(60, 90, 8), (90, 60, 8), (9, 5, 3), (300, 200, 48)])
def test_they_are_those_of_the_decomposition(rows, columns, count):
    generator = torch.Generator().manual_seed(0)
    rank = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(2, rows, rank, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(2, columns, rank, generator=generator))
    values = (left * torch.arange(1, rank + 1) ** -1.0) @ right.transpose(1, 2)
    found = principal_axes(values, count)
    torch.testing.assert_close(found.transpose(1, 2) @ found, torch.eye(count).expand(2, -1, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close((found * left[..., :count]).sum(1).abs(), torch.ones(2, count), rtol=0, atol=1e-3)


def test_there_is_none_where_no_variance_is_left():
    values = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 0]])
    found = principal_axes(values[None], 4)[0]
    torch.testing.assert_close(found.norm(dim=0), torch.tensor([1.0, 1, 0, 0]))
    torch.testing.assert_close(found[:, 0].abs(), torch.tensor([0.0, 0, 1, 0]))
    assert not principal_axes(torch.zeros(1, 4, 3), 2).any()


def test_columns_become_orthonormal_or_zero():
    columns = torch.tensor([[3.0, 6, 1], [0, 0, 1], [4, 8, 0]])
    found = orthonormal(columns[None])[0]
    torch.testing.assert_close(found[:, :2], torch.tensor([[0.6, 0], [0, 0], [0.8, 0]]))
    torch.testing.assert_close(found[:, 2], torch.nn.functional.normalize(torch.tensor([0.64, 1, -0.48]), dim=0))
