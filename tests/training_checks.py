"""What every training script owes: a run that was stopped ends where an uninterrupted one does."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import training


def options(folder: Path) -> argparse.Namespace:
    """A few tiny steps, the state saved after each."""
    return argparse.Namespace(
        out=folder / "checkpoint",
        work=folder,
        device=torch.device("cpu"),
        batch=2,
        questions=3,
        dense_steps=2,
        answer_steps=3,
        dense_rate=1e-3,
        answer_rate=1e-3,
        subset=0.26,
        full_share=0.4,
        save_seconds=0,
    )


def check_that_a_stopped_run_goes_on(
    student: Callable[[Path], training.Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`student` builds one in a working folder."""

    def train(name):
        torch.manual_seed(0)
        run = training.Run(student(tmp_path / name), options(tmp_path / name))
        run.train()
        return run.student.state_dict()

    whole = train("whole")
    loss = training.Run.answer_loss

    def stopped(self, step, visual_share):
        if step == 2:
            raise KeyboardInterrupt
        return loss(self, step, visual_share)

    monkeypatch.setattr(training.Run, "answer_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        train("stopped")
    monkeypatch.setattr(training.Run, "answer_loss", loss)
    assert not (tmp_path / "stopped/checkpoint").exists()
    resumed = train("stopped")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor)
    assert (tmp_path / "stopped/checkpoint/config.json").exists()
