"""Qwen3-VL sharded over two processes, and a mixture of experts."""

import pytest
import torch
from qwen_fast_checks import small
from several import part
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel
from zero_checks import *  # noqa: F403
from zero_checks import work

import qwen3_vl_vtr  # noqa: F401  registers the backbone, in each process
import strategy
from strategy.distributed import zero


def build(device):
    return small("shapes-qwen3", device)


def experts():
    size = {"vocab_size": 8, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3VLMoeTextConfig(**size, num_hidden_layers=4, num_experts=4, moe_intermediate_size=32)
    torch.manual_seed(0)
    decoder = Qwen3VLMoeTextModel._from_config(config, dtype=torch.bfloat16).eval()
    for parameter in decoder.parameters():
        parameter.data.normal_(std=0.1)
    return decoder


@torch.no_grad()
def pruned(decoder):
    """The hidden state of a pruned prompt, the tokens kept, and what that took of multiply-adds."""
    x = torch.randn(1, 40, 32, generator=torch.manual_seed(0)).to(decoder.device, decoder.dtype)
    config = strategy.VTRConfig(retain_ratio=0.5, prune_layer=[1, 2, 3])
    with strategy.prune(decoder, config, layout=[[(3, (1, 5, 6))]]) as run:
        hidden = decoder(inputs_embeds=x, attention_mask=torch.ones(1, 40, device=x.device).long()).last_hidden_state
    return hidden.cpu(), torch.cat([tokens for stage in run.stages for tokens in stage.kept]).cpu(), run.multiply_adds


def work_on_experts_too(rank, ranks, build):
    decoder = experts()
    with zero.lockstep(zero.shard(decoder, decoder)):
        found = pruned(decoder) if rank else None
    return work(rank, ranks, build) | {"experts": found}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return part(work_on_experts_too, build, 2, tmp_path_factory.mktemp("ranks"))


def test_experts_are_sharded_too(sharded):
    (hidden, kept, costs), whole = sharded.ranks[1]["experts"], pruned(experts())
    torch.testing.assert_close(hidden, whole[0])
    assert torch.equal(kept, whole[1])
    assert costs == whole[2]
