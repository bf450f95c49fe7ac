"""What a strategy makes of tokens that lie on no grid."""

import torch
from views import view_of

from strategy import VTRConfig
from strategy.clse import CLSE, evolution_factor, score, spectral_energy


def test_class_tokens_have_a_factor_of_one_and_leave_the_grid_whole():
    generator = torch.Generator().manual_seed(0)
    grid, frame = (2, 5, 6), 31  # a class token before each frame's 30 patches
    reference, features = torch.randn(2, 3, 2 * frame, 8, generator=generator).unbind(0)
    attention = torch.rand(3, 2 * frame, generator=generator)
    on_grid = torch.tensor([i for i in range(2 * frame) if i % frame])
    view = view_of(features, attention[:, None, None], (grid,), on_grid=(on_grid,), reference=reference)
    scores = CLSE(VTRConfig(keep_tokens=9)).score(view)
    assert torch.equal(scores[:, [0, frame]], attention[:, [0, frame]])
    patches = (tensor[:, on_grid] for tensor in (reference, features, attention))
    assert torch.equal(scores[:, on_grid], score(*patches, grid))
    energies = (spectral_energy(tensor[:, on_grid], grid) for tensor in (reference, features))
    assert torch.allclose(scores[:, on_grid], evolution_factor(*energies) * attention[:, on_grid])
