"""A cache that is too small for all requests: what was pruned makes room, and nothing is lost on the way."""

from engines import Reference, given, greedy, questions, running

VTR = {"strategy": "clse", "retain_ratio": 0.112}
FAMILY = "qwen2"
SIZE = 32  # tokens of a block
LONG = 120  # tokens of an answer


def cache(blocks: int) -> dict[str, int]:
    """The settings for a cache of so many blocks, and one that is never used."""
    layers, heads, width, bytes_each = 12, 2, 32, 4
    size = (blocks + 1) * layers * 2 * heads * width * SIZE * bytes_each
    return {"kv_cache_memory_bytes": size, "block_size": SIZE, "max_model_len": 480, "enable_prefix_caching": False}


def test_what_a_request_had_before_it_was_preempted_is_gone_on_with(folders):
    reference, asked = Reference(folders(FAMILY)), questions(FAMILY, 4)
    expected = [reference.answer(question, VTR, LONG, ignore_eos=True).tokens for question in asked]
    # A prompt needs 11 blocks until it is pruned, then 2, and with its answer 6: three begin, and one has to wait.
    with running(folders(FAMILY), VTR, **cache(15)) as engine:
        preempted, stock = [], engine.scheduler._preempt_request

        def preempt(request, *args, **kwargs):
            preempted.append(request.num_output_tokens)
            stock(request, *args, **kwargs)

        engine.scheduler._preempt_request = preempt
        # Like the reference, which may not end, vLLM may not say the token that ends an answer.
        found = engine.answer(asked, LONG, min_tokens=LONG)
        assert any(preempted), preempted
        assert [answer.tokens for answer in found] == expected
        assert engine.free_blocks == engine.scheduler.cache_config.num_gpu_blocks - 1


def most_at_once(folder, vtr, asked):
    """How many requests ran at once."""
    with running(folder, vtr, max_num_seqs=16, **cache(40)) as engine:
        core, most = engine.llm.llm_engine, 0
        for number, question in enumerate(asked):
            core.add_request(str(number), given(question), greedy(8, ignore_eos=True))
        while core.has_unfinished_requests():
            core.step()
            most = max(most, len(engine.scheduler.running))
        assert engine.free_blocks == engine.scheduler.cache_config.num_gpu_blocks - 1
        return most


def test_more_requests_run_at_once_in_the_same_memory(folders):
    asked = questions(FAMILY, 1) * 16
    unpruned, pruned = (most_at_once(folders(FAMILY), vtr, asked) for vtr in (None, VTR))
    assert pruned >= 4 * unpruned, (pruned, unpruned)
