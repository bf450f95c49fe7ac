"""Parts of a batch whose prompts show pictures of different sizes."""

import torch

from strategy.backbone import Span
from strategy.graph.alike_prompts import split_batch
from strategy.pruning.state import PrefillState


def parts(layout, lengths, padded):
    mask = torch.arange(padded) < torch.tensor(lengths)[:, None]
    state = PrefillState.from_layout(layout, torch.zeros(len(lengths), padded, 8), mask.long(), None)
    return state, split_batch(state, lengths, None)


def test_prompts_with_the_same_grids_are_a_part_and_no_longer_than_they_need():
    small, large = [Span(2, (1, 2, 2))], [Span(1, (1, 4, 4))]
    layout = [small, small, large, [], small, small, small, small, small]
    state, found = parts(layout, [9, 17, 30, 40, 9, 9, 9, 9, 9], 48)
    assert [part.samples for part in found] == [[0, 1, 4, 5, 6, 7, 8], [2], [3]]
    assert [part.length for part in found] == [32, 32, 48]
    assert all(part.rows.tolist() == part.samples for part in found)
    for part in found:
        [group] = part.state.groups
        assert group.batch_index.tolist() == list(range(len(part.samples)))
        for name in ("visual", "original_index"):
            whole = next(each for each in state.groups if part.samples[0] in each.samples)
            rows = [whole.samples.index(sample) for sample in part.samples]
            assert torch.equal(getattr(group, name), getattr(whole, name)[rows])
        assert group.text.shape[1] + group.num_visual == part.length
        assert torch.equal(part.state.last[:, 0], state.last[part.rows, 0])


def test_a_prompt_that_ends_with_its_picture_keeps_a_token_for_the_question():
    _, found = parts([[Span(16, (1, 4, 4))], [Span(2, (1, 2, 2))]], [32, 40], 48)
    for part in found:
        [group] = part.state.groups
        assert group.question_mask.any(1).all()
    assert found[0].length == 33


def test_prompts_that_are_all_alike_are_one_part():
    state, [part] = parts([[Span(1, (1, 2, 2))]] * 3, [9, 10, 11], 16)
    assert part.state is state
    assert (part.length, part.pruned) == (16, 0)
