"""The greedy loop of the graph engine, where it meets a GPU that is not there."""

from types import SimpleNamespace

import torch

from strategy.graph.generator import EOS_CHECK_LAG, GraphGenerator


def test_the_end_of_an_answer_is_awaited_on_the_card_of_the_model(monkeypatch):
    recorded, zeros = [], torch.zeros

    def unpinned(*shape, pin_memory, **options):
        assert pin_memory
        return zeros(*shape, **options)

    monkeypatch.setattr(torch, "zeros", unpinned)
    event = SimpleNamespace(record=recorded.append, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")
    token = SimpleNamespace(is_cuda=True, device="cuda:1")
    cache = SimpleNamespace(token=token, all_finished=torch.tensor([True]))
    engine = SimpleNamespace(decoder=SimpleNamespace(decode_step=lambda cache: lambda: None))
    assert GraphGenerator._decode_chunk(engine, cache, 9) == (1, True)
    assert recorded == ["the stream of cuda:1"] * (1 + EOS_CHECK_LAG)
