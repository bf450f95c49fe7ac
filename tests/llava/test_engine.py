"""The shared engine checks on LLaVA's decoder, and the published run."""

import json
from pathlib import Path

import pytest
import torch
from engine_checks import *  # noqa: F403
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaModel
from transformers.cache_utils import DynamicCache

import strategy
from strategy import VTRConfig

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_published_run(attention):
    tensors = load_file(GOLDEN / "llama_192.safetensors")
    facts = json.loads((GOLDEN / "llama_192.json").read_text())
    decoder = LlamaModel._from_config(LlamaConfig(**facts["config"]), attn_implementation=attention).eval()
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    decoder.load_state_dict(weights)
    layout = [[(facts["visual_start"], facts["grid"])]]
    cache = DynamicCache()
    config = VTRConfig(keep_tokens=facts["keep_tokens"])
    with torch.no_grad(), strategy.prune(decoder, config, backbone="llava", layout=layout) as run:
        output = decoder(inputs_embeds=tensors["inputs_embeds"], past_key_values=cache, use_cache=True)
    assert [stage.layer for stage in run.stages] == facts["prune_layers"]
    assert [stage.after for stage in run.stages] == facts["kept"]
    for number, stage in enumerate(run.stages):
        assert torch.equal(stage.kept[0], tensors[f"keep{number}"])
    torch.testing.assert_close(output.last_hidden_state, tensors["last_hidden_state"], rtol=0, atol=1e-4)
    assert [keys.shape[2] for keys in cache.key_cache] == facts["kv_lengths"]


def test_prompts_longer_than_the_rotary_table(family):
    """Each layer of this Llama has a table of its own, and a late layer of a pruned run sees few tokens."""
    config = LlamaConfig(**family.decoder("sdpa").config.to_diff_dict() | {"max_position_embeddings": 64})
    decoder = LlamaModel._from_config(config, attn_implementation="sdpa").eval()
    decoder.load_state_dict(family.decoder("sdpa").state_dict())
    outputs = []
    for model in (family.decoder("sdpa"), decoder):
        batch, cache = make("one image", 32), family.cache()  # noqa: F405
        with strategy.prune(model, VTRConfig(keep_tokens=10), backbone="llava", layout=batch.layout):
            family.run(model, batch.embeddings, None, batch.positions(), cache)
            outputs.append(family.run(model, batch.embeddings[:, :1], None, None, cache))
    torch.testing.assert_close(*outputs)
