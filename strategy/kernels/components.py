"""Principal components, by steps whose number does not depend on the values, so that a CUDA graph captures them.

torch's own decompositions ask the host whether they converged.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from strategy.kernels.selection import first_maximum

SPARE = 32  # directions that are followed besides those that are wanted, so that these converge
ROUNDS, SQUARES = 3, 10  # iterations of the subspace; squarings inside it, which are 2 ** 10 power iterations
DEPENDENT = 1e-5  # share of a column's length below which it lies in the span of those before
EPS = 1e-6  # share of the whole variance below which a component is rounding


def orthonormal(columns: Tensor) -> Tensor:
    """Return columns [G, N, M] made orthonormal in turn; one that lies in the span of those before is zero."""
    found = torch.zeros_like(columns)
    for at, column in enumerate(columns.split(1, dim=2)):
        left = column
        for _ in range(2):  # the second time against rounding
            left = left - found @ (found.transpose(1, 2) @ left)
        fresh = left.norm(dim=1, keepdim=True) > DEPENDENT * column.norm(dim=1, keepdim=True)
        found[..., at : at + 1] = normalize(left, dim=1) * fresh
    return found


def principal_axes(values: Tensor, count: int) -> Tensor:
    """Return the left singular vectors of values [G, N, C] for the greatest singular values, [G, N, count].

    They are those of subspace iterations that begin at fixed directions; zero where no variance is left.
    """
    number = min(count + SPARE, *values.shape[1:])
    channels, directions = (torch.arange(size, device=values.device) for size in (values.shape[2], number))
    axes = orthonormal(values @ torch.outer(channels, directions + 1).float().cos())
    for _ in range(ROUNDS):
        axes = orthonormal(values @ (values.transpose(1, 2) @ axes))
    inside = axes.transpose(1, 2) @ values
    left = inside @ inside.transpose(1, 2)
    whole, found = _trace(left), []
    for _ in range(count):
        power = left = left * (_trace(left) > EPS * whole)
        for _ in range(SQUARES):
            power = power / _trace(power).clamp(min=torch.finfo(power.dtype).tiny)
            power = power @ power
        column = first_maximum(power.diagonal(dim1=1, dim2=2))
        axis = normalize(power.take_along_dim(column[..., None], 2), dim=1)
        image = left @ axis
        value = axis.transpose(1, 2) @ image
        cross = axis @ image.transpose(1, 2)
        left = left - cross - cross.transpose(1, 2) + value * axis @ axis.transpose(1, 2)
        found.append(axis)
    return axes @ torch.cat(found, dim=2)


def _trace(matrices: Tensor) -> Tensor:
    """Return the traces [G, 1, 1] of matrices [G, M, M]."""
    return matrices.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
