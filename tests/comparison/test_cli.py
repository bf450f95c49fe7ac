"""Command lines of `compare` and `look`: each option reaches the runs that use it, and no other run."""

import pytest
from PIL import Image

from comparison import cli, compare, look
from comparison.inspection import Inspection
from comparison.runs import strategy_and_budget
from strategy.config import VTRConfig, describe_options, strategy_options

MODEL = ["--model", "m", "--pretrained", "p"]


def of_runs(*words, strategies="clse,fastv,priortr", budgets="64"):
    """The options of each run that a command line of `compare` asks for, and what is left of `--model_args`."""
    arguments = compare.parse([*MODEL, "--strategies", strategies, "--budgets", budgets, "--tasks", "t", *words])
    return compare.options_of_runs(arguments), arguments.model_args


@pytest.mark.parametrize(("command", "own"), [(compare, compare.SET_OTHERWISE), (look, look.SET_OTHERWISE)])
def test_help_shows_every_option_with_its_sentence_and_its_users(command, own, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, (_, sentence) in describe_options().items():
        assert (f"--{name} {name.upper()} " in shown) == (name not in own)
        assert (" ".join(sentence.split()) in shown) == (name not in own)
    for name, users in ((name, users) for name, users in strategy_options().items() if name not in own):
        default = describe_options()[name][0]
        end = "" if default is None else f"; default: {default}"
        assert f"(used by {', '.join(users)}{end})" in shown


def test_an_option_reaches_the_strategies_that_use_it_and_never_the_unpruned_run():
    (unpruned, *pruned), _ = of_runs("--clse_temp", "0.3", "--query_aggregation", "last", budgets="64,32")
    assert unpruned == {"enabled": False}
    assert pruned == [
        {"strategy": "clse", "keep_tokens": 64, "clse_temp": "0.3"},
        {"strategy": "clse", "keep_tokens": 32, "clse_temp": "0.3"},
        {"strategy": "fastv", "keep_tokens": 64},
        {"strategy": "fastv", "keep_tokens": 32},
        {"strategy": "priortr", "keep_tokens": 64, "query_aggregation": "last"},
        {"strategy": "priortr", "keep_tokens": 32, "query_aggregation": "last"},
    ]


def test_an_option_of_every_strategy_reaches_all_and_the_engine_the_unpruned_run_too():
    (unpruned, *pruned), _ = of_runs("--budget_basis", "mean", "--engine", "eager")
    assert unpruned == {"enabled": False, "engine": "eager"}
    assert [(each["budget_basis"], each["engine"]) for each in pruned] == [("mean", "eager")] * 3


def test_every_strategy_takes_what_reaches_it():
    given = {name: default for name, (default, _) in describe_options().items() if name in strategy_options()}
    for name in compare.strategy.available():
        options = cli.pruned_options(name, given, keep_tokens=64)
        own = [option for option, users in strategy_options().items() if name in users]
        assert sorted(options) == sorted(["strategy", "keep_tokens", *own])
        assert VTRConfig(**options).strategy == name


def test_random_tokens_are_drawn_with_each_seed_and_all_names_every_strategy():
    (_, *pruned), _ = of_runs("--seeds", "2", strategies="random,clse")
    assert pruned == [
        {"strategy": "random", "keep_tokens": 64, "seed": 0},
        {"strategy": "random", "keep_tokens": 64, "seed": 1},
        {"strategy": "clse", "keep_tokens": 64},
    ]
    (_, *pruned), _ = of_runs("--seeds", "1", strategies="all")
    *pruned, smaller = pruned
    assert [each["strategy"] for each in pruned] == list(compare.strategy.available())
    assert smaller == {"enabled": False, "downsample": 64}


def test_smaller_pictures_are_unpruned_runs_with_an_argument_of_the_model():
    (_, *smaller), _ = of_runs("--engine", "eager", strategies="downsample", budgets="64,32")
    assert smaller == [{"enabled": False, "engine": "eager", "downsample": budget} for budget in (64, 32)]
    assert [strategy_and_budget(each) for each in smaller] == [("downsample", 64), ("downsample", 32)]
    assert cli.config_of(smaller[0], engine="graph") == VTRConfig(enabled=False, engine="eager")
    assert cli.config_of({"keep_tokens": 3}, engine="graph") == VTRConfig(keep_tokens=3, engine="graph")
    with pytest.raises(ValueError, match="none of downsample uses it"):
        of_runs("--clse_temp", "0.3", strategies="downsample")


@pytest.mark.parametrize("text", ["vtr_clse_temp=0.3,dtype=float32", "dtype=float32, clse_temp = 0.3"])
def test_options_among_the_arguments_of_the_model_are_options(text):
    (unpruned, clse, fastv, _), rest = of_runs("--model_args", text)
    assert (clse["clse_temp"], rest) == ("0.3", "dtype=float32")
    assert "clse_temp" not in unpruned | fastv


def test_a_list_among_the_arguments_of_the_model_stays_whole():
    (_, *pruned), rest = of_runs("--model_args", "prune_layer=[1,4,8],dtype=float32")
    assert {VTRConfig(**each).prune_layer for each in pruned} == {(1, 4, 8)}
    assert rest == "dtype=float32"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--query_aggregation", "last"],
            "query_aggregation='last': none of clse, fastv uses it: leave it out, or choose priortr or priortr_2f",
        ),
        (["--query_aggregation", "question"], "query_aggregation='question': none of clse, fastv uses it"),
        (["--seeds", "0"], "--seeds 0: want a number of draws from 1 up"),
        (["--model_args", "seed=3"], "leave out seed, since --strategies, --budgets and --seeds set it"),
        (["--clse_temp", "0"], "clse_temp='0': allowed is a number above 0"),
        (
            ["--model_args", "vtr_keep_tokens=3"],
            "leave out keep_tokens, since --strategies, --budgets and --seeds",
        ),
        (["--model_args", "clse_temp=1", "--clse_temp", "2"], "clse_temp is given already: leave it out here"),
        (["--model_args", "clse_temp=1,vtr_clse_temp=2"], "clse_temp is given already: leave it out here"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(words, sentence):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        of_runs(*words, strategies="clse,fastv")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--query_aggregation", "last"],
            "look: query_aggregation='last': strategy=clse does not use it: leave it out",
        ),
        (["--model_args", "vtr_enabled=False"], "look: --model_args vtr_enabled=False: leave out enabled, since look"),
    ],
)
def test_look_refuses_what_it_cannot_ask(monkeypatch, tmp_path, words, sentence):
    monkeypatch.setattr("sys.argv", ["look", *MODEL, "--image", "i", "--question", "?", *words])
    with pytest.raises(SystemExit) as stop:
        look.main()
    assert str(stop.value).startswith(sentence)


def test_look_gives_the_unpruned_model_nothing_but_the_engine(monkeypatch, tmp_path):
    seen = []

    class Evaluator:
        def inspect_one(self, image, question, options):
            seen.append(dict(options))
            return Inspection(question, "", "yes", [Image.new("RGB", (8, 8))])

    monkeypatch.setattr(look, "load_evaluator", lambda arguments: Evaluator())
    words = ["--clse_temp", "0.3", "--engine", "eager", "--output", str(tmp_path / "look.png")]
    monkeypatch.setattr("sys.argv", ["look", *MODEL, "--image", "i", "--question", "?", *words])
    look.main()
    assert seen == [{"enabled": False, "engine": "eager"}, {"engine": "eager", "clse_temp": "0.3"}]
    assert (tmp_path / "look.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("strategies", "given", "limit"), [("all", (), 80), ("all", ("--limit", "400"), 400), ("clse,random", (), None)]
)
def test_all_strategies_are_asked_few_questions_if_no_number_is_given(strategies, given, limit):
    words = ["--model", "m", "--pretrained", "p", "--budgets", "192", "--tasks", "t", "--strategies", strategies]
    assert compare.parse([*words, *given]).limit == limit
