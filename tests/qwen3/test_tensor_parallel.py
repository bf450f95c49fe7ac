"""Qwen3-VL split over two processes, which its two key heads allow."""

import pytest
from qwen_fast_checks import small
from several import part
from tensor_parallel_checks import *  # noqa: F403
from tensor_parallel_checks import work
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

import qwen3_vl_vtr  # noqa: F401  registers the backbone, in each process
from strategy.distributed import tensor_parallel


def build(device):
    return small("shapes-qwen3", device)


@pytest.fixture(scope="module")
def parted(tmp_path_factory):
    return part(work, build, 2, tmp_path_factory.mktemp("ranks"))


def test_experts_are_refused():
    size = {"vocab_size": 8, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3VLMoeTextConfig(**size, num_hidden_layers=1, num_experts=4, moe_intermediate_size=32)
    decoder = Qwen3VLMoeTextModel._from_config(config)
    with pytest.raises(ValueError, match=r"tensor_parallel=2: .*experts.* cannot be split; device_map=auto"):
        tensor_parallel.split(decoder, decoder, 2)
