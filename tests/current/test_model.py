"""Whole models of today, pruned: the stock model with the pruned tokens hidden, and what `generate` needs besides."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from current_models import Family
from engine_checks import STEPS, TOLERANCE, Merges, all_hooks, merges_of
from qwen_checks import Prompts, check_beams_and_samples, generate, greedy
from torch import Tensor, nn

import strategy
from strategy import VTRConfig
from strategy.kernels.kv_cache import length as cache_length
from strategy.kernels.kv_cache import read as cache_read

# On grids as small as these the default cutoff of CLSE leaves the mean alone. random needs no attention, sparsevlm
# merges, priortr_2f reads the prompt without its question.
CASES = {"clse": {"ref_layers": 0, "clse_cutoff_ratio": 0.6}, "random": {}, "sparsevlm": {}, "priortr_2f": {}}
# The stock Qwen3.5 itself differs by so much between a pass in chunks and one token at a time.
LINEAR_TOLERANCE = {"rtol": 0, "atol": 1e-3}
LOWEST = torch.finfo(torch.float32).min


def config(family: Family, name: str = "clse", **more: Any) -> VTRConfig:
    stages = [4] if name == "priortr_2f" else family.stages
    budget = {knob: values[: len(stages)] for knob, values in family.budget.items()}
    return VTRConfig(strategy=name, prune_layer=stages, **CASES[name] | budget | more)


@pytest.fixture(params=["one", "several", "batch"])
def prompts(request: pytest.FixtureRequest, family: Family) -> Prompts:
    return family.of(request.param)


@contextmanager
def hiding(decoder: Any, prompts: Prompts, real: Tensor, stages: list[Any], merges: Merges) -> Iterator[None]:
    """Take what is pruned out of the mask that a stock decoder gives each layer, and merge what was merged.

    real: [B, L], prompts and what follows them, whose tokens see the final kept set at every layer.
    """
    samples, total = real.shape

    def alive(done: list[Any]) -> Tensor:
        there = real.clone()
        for sample in range(samples if done else 0):
            places = prompts.visual[sample]
            there[sample, places] = False
            there[sample, places[done[-1].kept[sample]]] = True
        return there

    def hook_for(number: int) -> Any:
        keys = alive([stage for stage in stages if stage.layer <= number])[:, None].repeat(1, total, 1)
        keys[:, prompts.length :] = alive(stages)[:, None]
        keys |= torch.eye(total, dtype=torch.bool)

        def hook(layer: nn.Module, args: Any, call: dict[str, Any]) -> Any:
            return args, call | {"attention_mask": call["attention_mask"].masked_fill(~keys[:, None], LOWEST)}

        return hook

    def merged(stage: int, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for sample, places in enumerate(prompts.visual):
            if (stage, sample) in merges:
                there = places[stages[stage - 1].kept[sample]] if stage else places
                kept = places[stages[stage].kept[sample]]
                hidden[sample, kept] = merges[stage, sample] @ hidden[sample, there]
        return hidden

    layers = decoder.layers
    handles = [layer.register_forward_pre_hook(hook_for(at), with_kwargs=True) for at, layer in enumerate(layers)]
    handles += [
        layers[stage.layer - 1].register_forward_hook(lambda layer, args, output, at=at: merged(at, output))
        for at, stage in enumerate(stages)
        if stage.layer
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def ask_oracle(family: Family, prompts: Prompts, tokens: Tensor, stages: list[Any], merges: Merges) -> Tensor:
    """The logits [B, STEPS, V] of the stock model run once over the prompts and all `tokens` but the last."""
    model, later = family.model("eager"), tokens[:, :-1]
    call = family.longer(prompts, later)
    with hiding(family.decoder(model), prompts, call["attention_mask"].bool(), stages, merges):
        return model(**call, use_cache=False).logits[:, prompts.length - 1 :]


@dataclass
class Shortened:
    """One sample's sequence, prompt and answer, as each layer of the stock decoder is given what is left of it.

    visual: Its visual tokens, in a sequence of `prompt` tokens and `later` ones without padding. kept: What each stage
    keeps of them. merges: The weights of the stages that merge.
    """

    visual: Tensor
    prompt: int
    later: int
    layers: list[int]
    kept: list[Tensor]
    merges: dict[int, Tensor]

    def places(self, done: int) -> Tensor:
        """The visual tokens left after so many stages."""
        return self.visual[self.kept[done - 1]] if done and len(self.visual) else self.visual

    def left(self, done: int) -> Tensor:
        """All tokens left after so many stages."""
        there = torch.ones(self.prompt + self.later, dtype=torch.bool)
        there[self.visual] = False
        there[self.places(done)] = True
        return there.nonzero()[:, 0]

    def hook(self, number: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Leave out of a layer's arguments, made for the whole sequence, what is not left; a hook."""
        done, total = sum(at <= number for at in self.layers), self.prompt + self.later
        left, hidden = self.left(done), args[0]
        if number in self.layers:
            whole = hidden.new_zeros(1, total, hidden.shape[-1])
            whole[:, self.left(done - 1)] = hidden
            if done - 1 in self.merges:
                whole[0, self.places(done)] = self.merges[done - 1] @ whole[0, self.places(done - 1)]
            hidden = whole[:, left]
        seen = torch.ones(total, total).tril().bool()
        gone = torch.ones(self.prompt, dtype=torch.bool)
        gone[[at for at in self.left(len(self.layers)).tolist() if at < self.prompt]] = False
        seen[self.prompt :, : self.prompt][:, gone] = False
        bias = torch.zeros(total, total).masked_fill(~seen, LOWEST)[left][:, left][None, None]
        more = {"attention_mask": bias if hasattr(layer, "self_attn") else None, "position_ids": None}
        more["position_embeddings"] = tuple(table[..., left, :] for table in kwargs["position_embeddings"])
        return (hidden, *args[1:]), kwargs | more


@torch.no_grad()
def ask_shortened(family: Family, prompts: Prompts, tokens: Tensor, stages: list[Any], merges: Merges) -> Tensor:
    """The same logits of the stock layers on what is left before each of them, sample by sample.

    A mask cannot take a token out of the state of a linear layer; so it is left out of the sequence, behind its prune.
    """
    model, later, logits, given = family.model("eager"), tokens[:, :-1], [], {}
    decoder, call = family.decoder(model), family.longer(prompts, later)
    keep = decoder.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    model(**call, use_cache=False)
    keep.remove()
    for sample, places in enumerate(prompts.visual):
        real = call["attention_mask"][sample].bool()
        kept = [stage.kept[sample] for stage in stages]
        own = {stage: weights for (stage, of), weights in merges.items() if of == sample}
        pad, layers = int((~real).sum()), [stage.layer for stage in stages]
        short = Shortened(places - pad, int(real.sum()) - later.shape[1], later.shape[1], layers, kept, own)
        handles = [
            layer.register_forward_pre_hook(partial(short.hook, number), with_kwargs=True)
            for number, layer in enumerate(decoder.layers)
        ]
        hidden = decoder(
            inputs_embeds=given["inputs_embeds"][sample, real][None],
            position_ids=given["position_ids"][:, sample, real][:, None],
            use_cache=False,
        ).last_hidden_state
        for handle in handles:
            handle.remove()
        logits.append(model.lm_head(hidden)[0, -STEPS:])
    return torch.stack(logits)


@pytest.mark.pairs
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_generate_is_the_stock_model_with_the_pruned_tokens_hidden(family, prompts, name, attention):
    model = family.model(attention)
    with merges_of(name) as merges, strategy.prune(model, config(family, name)) as run:
        tokens, logits = generate(model, prompts)
    linear = len(family.attending) < len(family.decoder(model).layers)
    ask, tolerance = (ask_shortened, LINEAR_TOLERANCE) if linear else (ask_oracle, TOLERANCE)
    oracle = ask(family, prompts, tokens, run.stages, merges)
    torch.testing.assert_close(logits, oracle, **tolerance)
    assert torch.equal(tokens, greedy(oracle))
    assert [stage.layer for stage in run.stages] == list(run.plan.layers)
    for sample, places in enumerate(prompts.visual):
        kept = [len(stage.kept[sample]) for stage in run.stages]
        assert kept == list(run.plan.kept(len(places)) if len(places) else [0] * len(kept))


@pytest.mark.pairs
@pytest.mark.parametrize("given", [VTRConfig(enabled=False), None])
def test_keeping_everything_is_the_stock_model_to_the_last_bit(family, prompts, given):
    model = family.model()
    stock = generate(model, prompts)
    wanted = given or VTRConfig(keep_tokens=[5000] * len(family.stages), prune_layer=family.stages, ref_layers=0)
    with strategy.prune(model, wanted) as run:
        tokens, logits = generate(model, prompts)
    assert torch.equal(logits, stock[1])
    assert torch.equal(tokens, stock[0])
    assert run.samples == sum(len(places) > 0 for places in prompts.visual)


@torch.no_grad()
def test_without_a_cache_the_same_tokens_are_kept_and_a_cache_holds_the_final_ones(family):
    model, prompts, results = family.model(), family.of("batch"), []
    call = family.longer(prompts, torch.zeros(3, 0, dtype=torch.long))
    for use_cache in (True, False):
        with strategy.prune(model, config(family)) as run:
            output = model(**call, use_cache=use_cache)
        results.append((output.logits, [kept for stage in run.stages for kept in stage.kept]))
        if use_cache:
            lost = [len(places) - len(kept) for places, kept in zip(prompts.visual, run.stages[-1].kept, strict=True)]
            lengths = {cache_read(output.cache, layer)[0].shape[2] for layer in family.attending}
            assert lengths == {cache_length(output.cache)} == {prompts.length - min(lost)}
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_beams_and_samples_of_a_prompt_have_its_pictures(family):
    model, prompts = family.model(), family.of("batch")
    with strategy.prune(model, config(family)) as run:
        check_beams_and_samples(model, prompts, run, rows=6)


@pytest.mark.parametrize("name", ["one", "batch"])
@torch.no_grad()
def test_a_second_question_goes_on_from_the_pruned_cache(family, name):
    model, prompts = family.model(), family.of(name)
    options = {"do_sample": False, "suppress_tokens": list(range(60, 80)), "return_dict_in_generate": True}
    question = torch.tensor([[5, 6, 7, 8]]).expand(len(prompts.visual), -1)
    with strategy.prune(model, config(family)) as run:
        first, again = (model.generate(**prompts.call, max_new_tokens=3, **options) for _ in range(2))
        ids = torch.cat([first.sequences, question], dim=1)
        mask = torch.cat([prompts.call["attention_mask"], torch.ones(len(ids), 7, dtype=torch.long)], dim=1)
        # The pictures are in the cache, so they are not given again.
        call = {"input_ids": ids, "attention_mask": mask, "cache": first.cache}
        if "token_type_ids" in prompts.call:
            call["token_type_ids"] = torch.nn.functional.pad(prompts.call["token_type_ids"], (0, 7))
        second = model.generate(**call, max_new_tokens=STEPS, **options)
        prefills = run.samples
        # By hand, what the cache does not hold yet: the last token of the answer, then the question.
        token, cache, expected = ids[:, -5:], again.cache, []
        for _ in range(STEPS):
            token = greedy(model(input_ids=token, cache=cache, use_cache=True).logits[:, -1:])
            expected.append(token)
    assert torch.equal(second.sequences[:, ids.shape[1] :], torch.cat(expected, dim=1))
    assert cache_length(second.cache) == cache_length(cache)
    assert prefills == 2 * sum(len(places) > 0 for places in prompts.visual)


def test_placeholders_without_pictures_are_an_error_and_unpruned_a_warning(family):
    model, prompts = family.model(), family.of("one")
    text = {name: prompts.call[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 2, "do_sample": False}
    with strategy.prune(model, config(family)) as run:
        with pytest.raises(ValueError, match="1 of 1 prompts have placeholder tokens of pictures or videos"):
            model.generate(**text, **options)
        with pytest.raises(ValueError, match="1 of 1 prompts have placeholder tokens"), torch.no_grad():
            model(**text)
        answer = model.generate(**prompts.call, **options)
        assert run.samples == 1
    with strategy.prune(model, VTRConfig(enabled=False)):
        with pytest.warns(UserWarning, match="1 of 1 prompts have placeholder tokens"):
            model.generate(**text, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert model.generate(**prompts.call, **options).shape == answer.shape


@torch.no_grad()
def test_pictures_of_another_prompt_are_an_error(family):
    model, prompts = family.model(), family.of("several")
    ids = prompts.call["input_ids"].clone()
    ids[0, prompts.visual[0][-1]] = 5
    embeddings, hooks = model.get_input_embeddings()(prompts.call["input_ids"]), all_hooks(model)
    with strategy.prune(model, config(family)):
        with pytest.raises(ValueError, match="are not the"):
            model(**prompts.call | {"input_ids": ids})
        with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds"):
            model(**prompts.call | {"input_ids": None, "inputs_embeds": embeddings})
    assert all_hooks(model) == hooks


def test_the_visual_tokens_of_a_picture_are_not_alike(family):
    # Among tokens that are alike, rounding would choose.
    model, prompts, seen = family.model(), family.of("one"), []
    hook = family.decoder(model).layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(**prompts.call)
    hook.remove()
    assert seen[0][0, prompts.visual[0]].std(dim=0).mean() > 0.1


def test_afterwards_the_model_is_the_stock_one_and_a_copy_prunes_by_itself(family):
    model, prompts = copy.deepcopy(family.model()), family.of("one")
    stock = generate(model, prompts)[1]  # first, since transformers sets attributes at the first call
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with strategy.prune(model, config(family)):
        pruned = generate(model, prompts)[1]
        other = copy.deepcopy(model)
    after = {name: set(vars(module)) - {"rope_deltas"} for name, module in model.named_modules()}
    assert after == {name: names - {"rope_deltas"} for name, names in before.items()}
    assert torch.equal(generate(model, prompts)[1], stock)
    assert torch.equal(generate(other, prompts)[1], pruned)
    assert not torch.equal(pruned, stock)


def test_what_a_tower_costs_does_not_depend_on_what_it_was_given_before(family):
    def costs(names: Sequence[str]) -> list[int]:
        model, found = family.model(), [0]
        with strategy.prune(model, config(family, "random")) as run:
            for name in names:
                generate(model, family.of(name), 1)
                found.append(run.multiply_adds["vision"])
        return [after - before for before, after in pairwise(found)]

    names = ["one", "several", "batch"]
    together = costs(names)
    assert together == [cost for name in names for cost in costs([name])]
    assert min(together) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_prunes_too(family, dtype):
    model, prompts = copy.deepcopy(family.model()).to(dtype), family.of("several")
    with strategy.prune(model, config(family)) as run:
        logits = generate(model, prompts)[1]
    assert torch.isfinite(logits).all()
    assert [stage.after for stage in run.stages] == list(run.plan.kept(len(prompts.visual[0])))
