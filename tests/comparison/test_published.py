"""Published figures: shown only where model, task, strategy and budget are those of a paper's table."""

import pytest

from comparison.published import published_figures


@pytest.mark.parametrize("pretrained", ["liuhaotian/llava-v1.5-7b", "/data/LLaVA-v1.5-7b/", "llava-v1.5-7b"])
def test_figures_of_the_same_model_task_strategy_and_budget(run, pretrained):
    runs = [run(task="pope"), *(run(name, budget, task="pope") for name in ("scope", "clse") for budget in (64, 65))]
    figures = published_figures(pretrained, runs)
    assert list(figures) == ["scope 64"]
    assert figures["scope 64"].percent == pytest.approx(100 * 83.9 / 85.9)
    assert figures["scope 64"].source == "arXiv 2602.04657"


def test_no_figures_of_others(run):
    assert published_figures("llava-v1.5-13b", [run("scope", 64, task="pope")]) == {}
    assert published_figures("llava-v1.5-7b", [run("scope", 64, task="shapes")]) == {}


def test_figures_are_plausible_and_not_given_twice(run):
    runs = [run(name, budget, task="gqa") for name in ("fastv", "visionzip", "scope") for budget in (192, 128, 64)]
    percents = [each.percent for each in published_figures("llava-v1.5-7b", runs).values()]
    assert len(percents) == 9
    assert all(70 < percent < 100 for percent in percents)
    assert percents[:3] == sorted(percents[:3], reverse=True)
