"""The layout that adapters find is that of the model's own visual tokens, whatever the sizes of pictures."""

from types import SimpleNamespace

import pytest
import torch
from current_models import FAMILIES, packed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qwen_checks import IMAGE

from strategy.backbone import find_backbone
from strategy.pruning.layout import resolve_layout

SIDES = st.integers(1, 400)
# One tile, the most tiles, and sides that differ by 400 times.
EXTREMES = [(24, 24), (48, 48), (1, 400), (400, 1), (399, 2), (20, 61)]


@pytest.mark.parametrize("kind", ["one", "several", "batch"])
def test_the_tokens_of_the_layout_are_those_of_the_prompts_pictures(family, kind):
    model, prompts = family.model(), family.of(kind)
    layout = find_backbone(model).layout(model, prompts.call)
    spans = resolve_layout(layout, *prompts.call["input_ids"].shape)
    for own, visual, grids in zip(spans, prompts.visual, prompts.grids or [None] * len(spans), strict=True):
        found = [at for span in own for start in span.starts for at in range(start, start + span.frame_size)]
        assert sorted(found) == found == visual.tolist()
        if grids is not None:
            assert [span.kind.grid for span in own] == grids


def sized(name, sizes, alone):
    """A prompt of pictures of such sizes, [1, S]; which of its tokens are new lines, and which lie behind no row."""
    model = FAMILIES[name].model()
    row, off, rest = [1], [False], [False]
    for own in packed(model, sizes, [alone] * len(sizes)):
        row += [IMAGE] * len(own) + [2]
        off += [*own.tolist(), False]
        # Behind a small picture that stands alone, or of tiles of which unpadding leaves nothing.
        rest += [bool(own[36:].all()) and at >= 36 for at in range(len(own))] + [False]
    return model, *map(torch.tensor, ([row], off, rest))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@settings(max_examples=60)
@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3))
@example(sizes=EXTREMES)
def test_new_lines_of_tiled_pictures_lie_off_the_grid_and_all_other_tokens_on_it(name, sizes):
    alone = len(sizes) == 1
    model, ids, off, rest = sized(name, sizes, alone)
    call = {"input_ids": ids, "image_sizes": torch.tensor(sizes), "batch_num_images": torch.tensor([len(sizes)])}
    [spans] = resolve_layout(find_backbone(model).layout(model, call), *ids.shape)
    visual, on_grid = torch.zeros(ids.shape[1], dtype=torch.bool), torch.zeros(ids.shape[1], dtype=torch.bool)
    for span in spans:
        places = torch.arange(span.starts[0], span.starts[0] + span.frame_size)
        visual[places] = True
        on_grid[places[span.kind.on_grid()]] = True
    placeholders = ids[0] == IMAGE
    assert torch.equal(on_grid, placeholders & ~off)
    assert torch.equal(visual, placeholders & ~rest)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl3", "llava_hf", "paligemma2"])
@settings(max_examples=40)
@given(shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4), data=st.data())
@example(shapes=[(1, 400), (400, 1), (1, 1)], data=SimpleNamespace(draw=lambda _: 1))
def test_pictures_of_any_size_lie_where_their_placeholders_are(name, shapes, data):
    family = FAMILIES[name]
    model = family.model()
    backbone, gap = find_backbone(model), data.draw(st.integers(0, 3))
    square = hasattr(backbone, "tile")
    height, width = backbone.tile(model.config) if square else (0, 0)
    grids = [[(1, height, width)] * (h % 12 + 1) if square else [(1, h, w)] for h, w in shapes]
    row, starts = [1], []
    for own in grids:
        starts += [len(row) + at * own[0][1] * own[0][2] for at in range(len(own))]
        row += [IMAGE] * sum(h * w for _, h, w in own) + [2] * (gap + 1)
    call = {
        "input_ids": torch.tensor([row]),
        "pixel_values": torch.zeros(1),
        "image_grid_thw": torch.tensor([(1, 2 * h, 2 * w) for h, w in shapes]),
    }
    [spans] = resolve_layout(backbone.layout(model, call), 1, len(row))
    assert [span.starts for span in spans] == [(start,) for start in starts]
    assert [span.kind.grid for span in spans] == [grid for own in grids for grid in own]
