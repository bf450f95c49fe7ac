"""Commands and Python of the documents are run here, or parsed by the code that would run them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass

import libyaml  # noqa: F401
import pytest
import tomllib
import torch
from documents import COMMANDS, DOCS, DOCUMENTS, READMES, ROOT, anchors, blocks, commands, evaluations, table
from lmms_checks import task_manager
from lmms_eval.__main__ import parse_eval_args
from lmms_eval.utils import simple_parse_args_string
from torch.distributed import run
from transformers import LlamaConfig, LlamaModel

import strategy
import training
from benchmarks import answers, curves, mixed, scaling, serving, speed
from benchmarks.command_line import numbers, pruned_options
from comparison import compare, look
from llava.lmms_eval_model import ARGUMENTS
from strategy import backbone, registry
from strategy.config import describe_options, field_names, strategy_options
from strategy.options import between

# A command has one of these words, or names a script of training. Each kind is parsed by a test here, or by one of the
# backbone's own tests.
PARSED = {"demo", "lmms_eval", "compare", "look", "speed", "benchmarks.scaling", "benchmarks.serving"}
PARSED |= {
    "benchmarks.answers",
    "benchmarks.curves",
    "benchmarks.mixed",
    "run_inference_video_qa.py",
    "eval_video_qa.py",
}
FACTS = strategy.Facts(depth=32, nominal_tokens=576)  # those of LLaVA-1.5-7B


def test_every_documented_command_is_of_a_kind_that_is_tried():
    for document, words in COMMANDS:
        if words[0] == "pip":  # as CI does; or the plug-in, beside a vLLM
            assert words[2:] in (["nox[uv]"], ["-e", ".", "-e", "serving/vllm"]), document
            continue
        if words[:2] == ["vllm", "serve"]:
            continue
        assert words[0] in ("nox", "python"), f"{document}: {shlex.join(words)}"
        if words[0] == "python" or "--" in words:
            given = {word.rpartition("/")[2] for word in words}
            training = any(word.startswith("train_") for word in given)
            assert given & PARSED or training, f"{document}: {shlex.join(words)}"
        else:
            assert words[1:2] in ([], ["-s"]), f"{document}: {shlex.join(words)}"


def test_documented_sessions_exist():
    noxfile = (ROOT / "noxfile.py").read_text()
    sessions = set(re.findall(r"^def (\w+)\(session|^    \"(\w+)\": Backbone", noxfile, re.MULTILINE))
    sessions = {name for names in sessions for name in names if name}
    named = set()
    for _, words in COMMANDS:
        if words[:2] == ["nox", "-s"]:
            named |= set(words[2 : words.index("--") if "--" in words else None])
    assert named
    assert named <= sessions


def test_documented_servers_ask_for_options_that_there_are():
    served = [words for _, words in COMMANDS if words[:2] == ["vllm", "serve"]]
    assert served
    for words in served:
        given = json.loads(words[words.index("--additional-config") + 1])
        assert strategy.VTRConfig(**given.pop("vtr")).enabled
        assert not given


def test_the_documented_measure_of_servers_is_understood():
    [words] = [words for _, words in COMMANDS if "benchmarks.serving" in words]
    assert len(serving.ways(serving.parse(words[words.index("benchmarks.serving") + 1 :]))) == 3


def test_documented_demos_name_a_backbone():
    backbones = re.findall(r"^    \"(\w+)\": Backbone", (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    demos = [words for words in commands("demo") if "--" in words]
    inline = [
        shlex.split(command) for d in DOCUMENTS for command in re.findall(r"`(nox -s demo -- \w+)`", d.read_text())
    ]
    assert inline
    assert {words[-1] for words in (*demos, *inline)} <= set(backbones)


@pytest.mark.parametrize("words", evaluations("llava_vtr"), ids=lambda words: words[3][-60:])
def test_documented_evaluations_are_understood(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lmms_eval", *words])
    _, options = parse_eval_args()
    arguments = simple_parse_args_string(options.model_args)
    strategy.VTRConfig.take(arguments)
    assert set(arguments) <= set(ARGUMENTS)
    known = task_manager("llava_vtr").all_tasks
    assert set(options.tasks.split(",")) <= set(known)


def test_documented_python_runs_and_its_strategy_prunes(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(registry, "_strategies", dict(registry._strategies))
    monkeypatch.setattr(backbone, "_backbones", dict(backbone._backbones))
    shared = {}
    for document, block in sorted(blocks("python"), key=lambda pair: pair[0].name != "quickstart.md"):
        # These have tests of their own, the first three in other environments.
        other = document.parent.parent.name in ("image", "video", "serving") or document.name == "adding_a_backbone.md"
        if other or '@register("change")' in block:
            continue
        # The quickstart comes first and loads the model and the inputs that other documents take as given.
        names = {"__name__": "documented", **{name: shared[name] for name in ("model", "inputs") if name in shared}}
        exec(compile(block, str(document), "exec"), names)
        shared |= names
    assert capsys.readouterr().out.count("clse: prune layers [1, 4, 8], 576 visual tokens kept 330/210/62") == 2
    text = {"input_ids": shared["inputs"]["input_ids"].clamp(min=0)}
    assert shared["why_no_graph"](shared["model"], text) == "1 x prefill: stock prefill (no prompt has visual tokens)"
    decoder = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_attention_heads=2))
    config = strategy.VTRConfig(strategy="attention", keep_tokens=9, head_choice="max")
    with strategy.prune(decoder, config, backbone="llava", layout=[[(2, (1, 8, 8))]]) as run:
        decoder(inputs_embeds=torch.randn(1, 70, 16))
    assert [stage.after for stage in run.stages] == [15, 9, 2]
    spread = strategy.VTRConfig(strategy="spread", keep_tokens=4)
    with strategy.prune(decoder, spread, backbone="llava", layout=[[(2, (1, 8, 8))]]) as run:
        decoder(inputs_embeds=torch.eye(16)[torch.arange(70) // 17 % 4][None])
    assert run.stages[0].kept[0].tolist() == [0, 15, 32, 49]  # the first of each kind
    with pytest.raises(ValueError, match="clse does not use it: leave it out, or choose attention"):
        strategy.VTRConfig(head_choice="max")


TRAINED = {name: f"shapes-{name}" for name in ("llava", "qwen2", "qwen3", "qwen3_5", "video")}


@pytest.mark.parametrize(("name", "trained"), [*TRAINED.items(), ("clutter", "clutter-llava")])
def test_the_documented_training_is_understood(monkeypatch, name, trained):
    [words] = [words for _, words in COMMANDS if any(f"train_{name}.py" in word for word in words)]
    start = next(i for i, word in enumerate(words) if f"train_{name}.py" in word)
    assert (ROOT / words[start]).is_file()
    monkeypatch.setattr(sys, "argv", words[start:])
    assert str(training.options("").out) == f"/tmp/{trained}/checkpoint"


def test_a_documented_strategy_is_one_short_file_that_the_matrix_tests(tmp_path):
    [block] = [block for _, block in blocks("python") if '@register("change")' in block]
    assert len(block.splitlines()) < 40
    for folder in ("strategy", "tests", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "strategy/change.py").write_text(block)
    tests = ["tests/llava/test_engine.py", "tests/strategy"]
    command = [sys.executable, "-m", "pytest", *tests, "-k", "change", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "examples/shapes")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30


@pytest.mark.parametrize("words", commands("compare"), ids=lambda words: words[2])
def test_documented_comparisons_are_understood(words):
    given = compare.parse(["--model", "m", "--pretrained", "p", *words[words.index("compare") + 1 :]])
    assert set(given.strategies.split(",")) - {"change", "all"} <= set(compare.strategy_names())
    assert all(budget.isdecimal() for budget in given.budgets.split(","))


@pytest.mark.parametrize("words", commands("speed"), ids=lambda words: words[2])
def test_documented_measurements_are_understood(words):
    given = speed.parse(["--backbone", words[2], *words[words.index("speed") + 1 :]])
    assert all(pruned_options(given.strategy, budget) for budget in numbers(given.budget, float))


@pytest.mark.parametrize("words", commands("benchmarks.answers"), ids=lambda words: words[2])
def test_documented_measurements_of_answers_are_understood(words):
    given = answers.parse(words[words.index("benchmarks.answers") + 1 :])
    assert given.backbone == words[2]
    assert len(given.batches) > 1


@pytest.mark.parametrize("words", commands("benchmarks.mixed"), ids=lambda words: words[2])
def test_documented_mixed_batches_are_understood(words):
    given = mixed.parse(words[words.index("benchmarks.mixed") + 1 :])
    assert words[2] == given.backbone


@pytest.mark.parametrize("words", commands("benchmarks.curves"), ids=lambda words: " ".join(words[2:]))
def test_documented_curves_are_understood(words):
    given = curves.parse([*words[words.index("benchmarks.curves") + 1 :], "--device", "cuda"])
    assert given.backbone == words[2]
    assert sum(len(setting.ways) for setting in given.settings) > 5


@pytest.mark.parametrize("words", commands("benchmarks.scaling"), ids=lambda words: words[-1])
def test_documented_measurements_on_several_gpus_are_understood(words, monkeypatch):
    launched = run.parse_args(words[words.index("torch.distributed.run") + 1 :])
    assert (launched.module, launched.training_script) == (True, "benchmarks.scaling")
    monkeypatch.setenv("WORLD_SIZE", launched.nproc_per_node)
    assert scaling.parse(launched.training_script_args).backbone.startswith(words[2])


@pytest.mark.parametrize("words", commands("look"), ids=lambda words: words[2])
def test_documented_looks_are_understood(words):
    given = look.parse(["--model", "m", "--pretrained", "p", *words[words.index("look") + 1 :]])
    strategy.VTRConfig(**{name: getattr(given, name) for name in field_names() if hasattr(given, name)})
    assert (ROOT / given.image).is_file()


def option_rows():
    """Return the rows of the table of options, as the code declares them."""
    users = strategy_options()
    return [
        f"| `{name}` | {'none' if default is None else f'`{default}`'} | "
        f"{', '.join(f'`{user}`' for user in users[name]) if name in users else 'all'} | {sentence} |"
        for name, (default, sentence) in describe_options().items()
    ]


def strategy_cells():
    """Return the first and the last two cells of each row of the table of strategies, as their plans are."""
    plans = {name: registry.get(name)(strategy.VTRConfig(strategy=name)).plan(FACTS) for name in strategy.available()}
    return {
        f"`{name}`": [", ".join(map(str, plan.layers)), "/".join(map(str, plan.kept(FACTS.nominal_tokens)))]
        for name, plan in plans.items()
    }


def complete_rows(document, shown, wanted):
    """Compare the rows of a table with those wanted, and print the ones that lack or are too many."""
    lacking = [row for row in wanted if row not in shown]
    surplus = [row for row in shown if row not in wanted]
    said = [f"{document} lacks:", *lacking] * bool(lacking) + [f"{document} has in excess:", *surplus] * bool(surplus)
    assert not said, "\n".join(said)
    assert shown == wanted, f"{document}: the order of the rows is that of the code"


def test_the_table_of_options_is_complete():
    complete_rows("docs/options.md", table(ROOT / "docs/options.md", "| option |"), option_rows())


def test_the_table_of_strategies_is_complete():
    rows = [row.strip("| ").split(" | ") for row in table(ROOT / "docs/strategies.md", "| strategy |")]
    shown = sorted(" | ".join(["", row[0], "SCORE", "SOURCE", *row[-2:], ""]).strip() for row in rows)
    wanted = sorted(f"| {name} | SCORE | SOURCE | {' | '.join(cells)} |" for name, cells in strategy_cells().items())
    complete_rows("docs/strategies.md", shown, wanted)
    assert all(len(row) == 5 and all(row) for row in rows)


def test_a_row_that_a_table_lacks_is_printed(monkeypatch):
    @dataclass(frozen=True, init=False)
    class Own(strategy.Options):
        sharpness: float = strategy.option(0.5, between(0, 1), "How sharp.")

    kind = type("Sharp", (registry.get("fastv"),), {"options_type": Own})
    monkeypatch.setitem(registry._strategies, "sharp", kind)
    for test, row in {
        test_the_table_of_options_is_complete: "| `sharpness` | `0.5` | `sharp` | How sharp. |",
        test_the_table_of_strategies_is_complete: "| `sharp` | SCORE | SOURCE | 2 | 288 |",
    }.items():
        with pytest.raises(AssertionError, match=rf"^docs/\w+\.md lacks:\n(.*\n)* *{re.escape(row)}\n"):
            test()


def test_the_table_of_arguments_is_complete():
    readme = (ROOT / "image/LLaVA/README.md").read_text()
    for name in ARGUMENTS:
        assert f"| `{name}` |" in readme


def test_documented_errors_are_those_of_the_code():
    with pytest.raises(ValueError, match="does not use it") as error:
        strategy.VTRConfig(query_aggregation="last")
    assert f"```text\n{error.value}\n```" in (ROOT / "docs/options.md").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_every_document_can_be_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        new = {
            (document.parent / target).resolve()
            for document in new
            for target in re.findall(r"\]\(([^)#:]+\.md)[^):]*\)", document.read_text())
        }
        new = (new & set(DOCUMENTS)) - reached
    assert reached == set(DOCUMENTS)


def test_links_lead_somewhere():
    links = 0
    for document in (*ROOT.glob("*.md"), *READMES[1:], *DOCS):
        for target, _, anchor in re.findall(r"\]\(([^)#:\s]*)(#([^)\s]*))?\)", document.read_text()):
            place = (document.parent / target).resolve() if target else document
            assert place.exists(), f"{document.name}: {target}"
            assert not anchor or anchor in anchors(place), f"{document.name}: {target}#{anchor}"
            links += 1
    assert links > 100


@pytest.mark.parametrize("folder", [".", "image/LLaVA", "image/Qwen2-VL", "image/Qwen3-VL", "video/Video-LLaVA"])
def test_locks_hold_what_the_projects_pin(folder):
    settings = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())
    needs = [*settings["project"]["dependencies"], *settings.get("dependency-groups", {}).get("test", [])]
    locked = (ROOT / folder / "requirements.lock").read_text().splitlines()
    pinned = [need for need in needs if "==" in need]
    assert pinned
    assert all(any(line.startswith(pin) for line in locked) for pin in pinned)
