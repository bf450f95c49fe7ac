"""The notebook examples/walkthrough.ipynb, cell by cell."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import strategy
from strategy import registry

NOTEBOOK = Path(__file__).parents[2] / "examples/walkthrough.ipynb"


@pytest.fixture(scope="module")
def names():
    """What the cells define, run in order in one process, from a folder below the root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(NOTEBOOK.parent)
        patch.setattr(registry, "_strategies", dict(registry._strategies))
        patch.setattr(plt, "show", lambda *_: None)
        plt.switch_backend("agg")
        defined = {"__name__": "notebook"}
        for number, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"]):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), defined)
        yield defined
        plt.close("all")


def test_the_notebook_is_small_and_stores_no_outputs():
    assert NOTEBOOK.stat().st_size < 60_000
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 4
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


def test_the_model_answers_as_it_did_with_all_tokens(names):
    assert names["unpruned"]
    assert names["pruned"] == names["unpruned"]
    assert names["ask"](names["QUESTION"]) == names["unpruned"]


def test_the_new_strategy_prunes(names):
    [stage] = names["run"].stages
    assert (stage.layer, stage.before, stage.after) == (1, 576, 64)
    assert names["answer"]
    assert names["run"].strategy == "unusual"


def test_the_pictures_show_what_is_kept(names):
    with strategy.prune(names["model"], names["config"]) as run:
        names["ask"](names["QUESTION"])
    figure, masks = names["show"](run), names["kept_masks"](run)
    assert [int(mask.sum()) for mask in masks] == [stage.after for stage in run.stages] == [110, 70, 20]
    for mask, stage in zip(masks, run.stages, strict=True):
        assert torch.equal(mask.flatten().nonzero()[:, 0], stage.kept[0])
    for panel, mask in zip(figure.axes[1:], masks, strict=True):
        assert ((panel.images[1].get_alpha() == 0) == mask.numpy()).all()
