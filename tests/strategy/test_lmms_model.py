"""The mixin of the lmms-eval models: what a journal's answers depend on."""

import pytest

from strategy import VTRConfig
from strategy.evaluation.lmms_model import IGNORED_ON_RESUME, PrunedModelMixin


class Model(PrunedModelMixin):
    """A model that only opens journals."""

    model_id = "model"


def settings(folder, config, **arguments):
    journal = Model().open_journal(config, {"pretrained": "here", "resume_folder": str(folder)} | arguments, 1)
    journal.close()
    return journal.settings


def test_each_option_is_a_setting_of_its_own(tmp_path):
    config = VTRConfig(strategy="priortr", head_aggregation="max", keep_tokens=64)
    found = settings(tmp_path, config)
    assert found == {"model": "model", "pretrained": "here"} | {
        name: value for name, value in config.values().items() if name not in IGNORED_ON_RESUME
    }
    assert found["head_aggregation"] == "max"
    assert found != settings(tmp_path, VTRConfig(strategy="priortr", keep_tokens=64))


def test_what_cannot_change_answers_is_no_setting(tmp_path):
    plain = settings(tmp_path, VTRConfig())
    assert plain == settings(tmp_path, VTRConfig(engine="eager"), batch_size=8, device="cpu", zero_stage=3)
    assert plain != settings(tmp_path, VTRConfig(), conv_template="other")


def test_without_a_folder_there_is_no_journal():
    assert Model().open_journal(VTRConfig(), {"resume_folder": None}, 1) is None
    assert Model().open_journal(VTRConfig(), {}, 1) is None
    with pytest.raises(ValueError, match="resume_folder= is empty: name a folder, or omit it"):
        Model().open_journal(VTRConfig(), {"resume_folder": " "}, 1)
