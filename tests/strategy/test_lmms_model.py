"""The mixin of the lmms-eval models: what a journal's answers depend on."""

import json

import pytest

from strategy import VTRConfig
from strategy.evaluation import digest
from strategy.evaluation.batch_size import AUTO
from strategy.evaluation.lmms_model import IGNORED_ON_RESUME, PrunedModelMixin, Totals


class Model(PrunedModelMixin):
    """A model that only opens journals."""

    model_id = "model"


def settings(folder, config, weights=(), **arguments):
    journal = Model().open_journal(config, {"pretrained": "here", "resume_folder": str(folder)} | arguments, 1, weights)
    journal.close()
    return journal.settings


def test_each_option_is_a_setting_of_its_own(tmp_path):
    config = VTRConfig(strategy="priortr", head_aggregation="max", keep_tokens=64)
    found = settings(tmp_path, config)
    digests = {"code": digest.of_code(["strategy"]), "weights": digest.of_weights([])} | digest.of_versions()
    options = {name: value for name, value in config.values().items() if name not in IGNORED_ON_RESUME}
    assert found == json.loads(json.dumps({"model": "model"} | options | digests))
    assert found["head_aggregation"] == "max"
    assert found != settings(tmp_path, VTRConfig(strategy="priortr", keep_tokens=64))


def test_what_cannot_change_answers_is_no_setting(tmp_path):
    plain, other = (
        settings(tmp_path, VTRConfig()),
        {"batch_size": AUTO, "max_batch_size": 8, "device": "cpu", "zero_stage": 3},
    )
    assert plain == settings(tmp_path, VTRConfig(engine="eager"), prepare_ahead=0, **other)
    assert plain != settings(tmp_path, VTRConfig(), conv_template="other")


def test_weights_count_by_their_content(tmp_path):
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_text("weights")
    first, moved = (settings(tmp_path, VTRConfig(), [folder], pretrained=str(folder)) for folder in folders)
    assert first == moved
    (folders[0] / "model.safetensors").write_text("weightz")
    assert settings(tmp_path, VTRConfig(), [folders[0]])["weights"] != first["weights"]


@pytest.mark.parametrize(
    ("counts", "sentences"),
    [
        ((20, 0, 0, 0), []),
        ((20, 5, 2, 0), ["5 more questions were answered by an earlier run", "2 of 20 questions have no answer"]),
        ((20, 20, 0, 0), ["no question reached the model: all 20 were answered by an earlier run"]),
        ((0, 0, 0, 0), ["no question reached the model: all answers were in a cache"]),
        ((20, 0, 0, 3), ["3 questions were asked again, since their documents have changed"]),
    ],
)
def test_totals_say_what_did_not_reach_the_model(counts, sentences):
    said = [sentence for _, sentence in Totals(*counts).sentences()]
    assert len(said) == len(sentences)
    assert all(map(str.startswith, said, sentences))


def test_without_a_folder_there_is_no_journal():
    assert Model().open_journal(VTRConfig(), {"resume_folder": None}, 1, []) is None
    assert Model().open_journal(VTRConfig(), {}, 1, []) is None
    with pytest.raises(ValueError, match="resume_folder= is empty: name a folder, or omit it"):
        Model().open_journal(VTRConfig(), {"resume_folder": " "}, 1, [])
