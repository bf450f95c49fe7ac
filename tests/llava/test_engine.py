"""The shared engine checks on LLaVA's decoder."""

import torch
from engine_checks import *  # noqa: F403
from transformers import LlamaConfig, LlamaModel

import strategy
from strategy import VTRConfig


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
