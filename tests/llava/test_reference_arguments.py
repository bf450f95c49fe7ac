"""Command lines of PriorTR and of lmms-eval's own LLaVA, as `llava_vtr` takes them."""

import inspect

import pytest
import torch
from lmms_checks import CHECKPOINTS
from lmms_eval.models import get_model
from lmms_eval.models.simple.llava import Llava

from llava import lmms_eval_model
from llava.model.builder import load_pretrained_model

SHAPES = CHECKPOINTS / "shapes-llava"


def load(arguments):
    return get_model("llava_vtr").create_from_arg_string(f"pretrained={SHAPES},{arguments}")


@pytest.fixture
def loaded(monkeypatch):
    """What the loader is asked for; the model is loaded on the CPU with sdpa, whatever that is."""
    asked = []

    def record(path, **options):
        asked.append(options)
        return load_pretrained_model(path, device="cpu")

    monkeypatch.setattr(lmms_eval_model, "load_pretrained_model", record)
    return asked


@pytest.mark.parametrize(
    ("arguments", "layers", "kept"),
    [
        ("strategy=priortr,keep_ratio=0.25", (3,), (144,)),
        ("vtr_strategy=priortr,vtr_keep_ratio=0.25,vtr_prune_layer=3,vtr_query_aggregation=auto", (3,), (144,)),
        ("strategy=fastv,keep_ratio=0.5,query_aggregation=auto,prune_layer=3", (3,), (288,)),
        ("strategy=clse,keep_ratio=0.334,query_aggregation=question,head_aggregation=mean", (1, 4, 8), (330, 210, 62)),
    ],
)
def test_a_ratio_and_an_aggregation_of_priortr_are_taken(loaded, arguments, layers, kept):
    plan = load(f"device=cpu,{arguments}").record.plan
    assert (plan.layers, plan.kept(576)) == (layers, kept)


@pytest.mark.parametrize("place", ["auto", "balanced", "sequential"])
def test_a_placement_reaches_the_loader(loaded, place):
    load(f"device_map={place},enabled=False")
    assert loaded[0]["device_map"] == place


def test_a_device_map_may_name_the_device(loaded):
    load("device_map=cpu,enabled=False")
    assert (loaded[0]["device"], loaded[0]["device_map"]) == ("cpu", None)


@pytest.mark.parametrize("processes", ["2", "4"])
def test_each_of_several_processes_takes_its_own_device(loaded, monkeypatch, processes):
    monkeypatch.setattr(lmms_eval_model.processes, "world_size", lambda: int(processes))
    load("device_map=auto,enabled=False")
    assert loaded[0]["device_map"] is None


def test_a_model_that_was_placed_automatically_answers():
    lm = load("device_map=auto,keep_tokens=64")
    ids = torch.tensor([[1, -200, 300, 301]], device=lm.model.device)
    pixels = torch.zeros(1, 3, 336, 336, device=lm.model.device)
    assert lm.model.generate(ids, images=pixels, max_new_tokens=2, pad_token_id=0).shape[1] <= 2
    assert lm.record.samples == 1


@pytest.mark.parametrize(
    ("arguments", "attention"),
    [
        ("use_flash_attention_2=True", "flash_attention_2"),
        ("use_flash_attention_2=True,attn_implementation=flash_attention_2", "flash_attention_2"),
        ("use_flash_attention_2=False", "sdpa"),
        ("use_flash_attention_2=False,attn_implementation=eager", "eager"),
    ],
)
def test_use_flash_attention_2_names_an_attention(loaded, arguments, attention):
    load(f"{arguments},enabled=False")
    assert loaded[0]["attn_implementation"] == attention


def test_a_template_of_video_llava_asks_with_its_text(loaded):
    lm = load("conv_template=llava_v1,enabled=False")
    ids = lm._tokenize("What is it?", 0, None)
    assert "A chat between a curious human" in lm.tokenizer.decode(ids)
    assert "the human's questions. USER: What is it? ASSISTANT:" in lm.tokenizer.decode(ids)


def test_every_argument_of_the_stock_wrapper_is_taken_at_its_default(loaded):
    stock = inspect.signature(Llava.__init__).parameters.values()
    given = {p.name: p.default for p in stock if p.default is not p.empty}
    places = {"pretrained": str(SHAPES), "device": "cpu", "device_map": "cpu"}
    given = {name: value for name, value in given.items() if name != "customized_config"} | places
    assert set(lmms_eval_model.WITHOUT_EFFECT) <= set(given)
    get_model("llava_vtr")(**given, enabled=False)
    get_model("llava_vtr")(pretrained=str(SHAPES), device="cpu", enabled=False)
    assert loaded[0] == loaded[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("keep_ratio=0.2,retain_ratio=0.2", "keep_ratio and retain_ratio are the same argument"),
        ("keep_ratio=0.2,vtr_retain_ratio=0.2", "keep_ratio and retain_ratio are the same argument"),
        ("keep_ratio=0.2,vtr_keep_ratio=0.2", "keep_ratio and vtr_keep_ratio are the same argument"),
        ("keep_ratio=2", "keep_ratio=2: allowed is a ratio above 0"),
        ("vtr_keep_ratio=0.2,keep_tokens=64", "give one of the two"),
        ("strategy=fastv,query_aggregation=last", "query_aggregation='last': strategy=fastv does not use it"),
        ("device_map=everywhere", "device_map='everywhere': allowed are auto, balanced"),
        ("device_map=cpu,device=cuda:0", "device=cuda:0 and device_map=cpu: give one of the two"),
        ("use_flash_attention_2=maybe", "use_flash_attention_2='maybe': allowed are True and False"),
        ("use_flash_attention_2=True,attn_implementation=sdpa", "attn_implementation=sdpa: give one of the two"),
        ("truncation=maybe", "truncation='maybe': allowed are True and False"),
        ("use_cache=2", "use_cache=2: allowed are True and False"),
        ("conv_template=llava_v9", "allowed are default, v1, vicuna_v1, llava_v1"),
    ],
)
def test_what_contradicts_itself_or_means_nothing_is_one_sentence(loaded, arguments, words):
    with pytest.raises(SystemExit) as stop:
        load(arguments)
    assert str(stop.value).startswith("llava_vtr: ")
    assert words in str(stop.value)
    assert not loaded
