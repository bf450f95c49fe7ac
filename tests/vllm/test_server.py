"""The OpenAI server with the plug-in, over two processes that share the model or the requests, and a real client."""

import base64
import io
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest
from engines import CHECKPOINTS, Reference, questions
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import serving

VTR = {"strategy": "clse", "retain_ratio": 0.112}
MODEL = str(CHECKPOINTS / "shapes-qwen2")
MORE = {
    "max_model_len": 1024,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 26,
}
SPLITS = {
    "tensor parallel": {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"},  # the tower's three heads stay whole
    "data parallel": {"data_parallel_size": 2, "api_server_count": 2},
}


@contextmanager
def running(split):
    """A client of a server whose processes share the work as `split` says."""
    given = serving.parse(["--model", MODEL, "--dtype", "float32", "--more", json.dumps(MORE | split)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        with serving.serving(given, {"vtr": VTR}, seconds=300) as address:
            yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module", params=SPLITS)
def server(request):
    with running(SPLITS[request.param]) as client:
        yield client


def counted(server, name):
    """The sum of a counter of vLLM's metrics endpoint over the engines."""
    page = urllib.request.urlopen(str(server.base_url).replace("/v1/", "/metrics")).read().decode()
    families = {family.name: family.samples for family in text_string_to_metric_families(page)}
    return sum(sample.value for sample in families[name] if sample.name == f"{name}_total")


def asked(question, text):
    png = io.BytesIO()
    question.pictures[0].save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}],
        }
    ]


@pytest.mark.processes
def test_answers_of_a_server_are_those_on_transformers(server):
    reference, given = Reference(Path(MODEL)), questions("qwen2", 6)
    texts = [question.text.partition("<|vision_end|>")[2].partition("<|im_end|>")[0] for question in given]
    decode = reference.processor.tokenizer.decode
    expected = [decode(reference.answer(each, VTR).tokens, skip_special_tokens=True) for each in given]

    def ask(number):
        stream = server.chat.completions.create(
            model=MODEL, messages=asked(given[number], texts[number]), max_tokens=12, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == expected
    # What the last step counted may come after its answer.
    until = time.monotonic() + 20
    while counted(server, "vllm:vtr_requests") < 6 and time.monotonic() < until:
        time.sleep(0.1)
    assert counted(server, "vllm:vtr_requests") == 6
    after, before = (counted(server, f"vllm:vtr_visual_tokens_{name}") for name in ("after", "before"))
    assert 0 < after < 0.112 * before


@pytest.mark.processes
def test_a_client_that_goes_away_stops_nobody_else(server):
    [question] = questions("qwen2", 1)
    stream = server.chat.completions.create(
        model=MODEL, messages=asked(question, "What is it?"), max_tokens=400, temperature=0, stream=True
    )
    next(iter(stream))
    stream.close()
    answer = server.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "What is red?"}], max_tokens=4, temperature=0
    )
    assert answer.usage.completion_tokens > 0


@pytest.mark.processes
def test_a_server_whose_processes_are_killed_can_be_started_again():
    [question], answers = questions("qwen2", 1), []
    for _ in range(2):
        with running({}) as server:
            stream = server.chat.completions.create(
                model=MODEL, messages=asked(question, "What is it?"), max_tokens=400, temperature=0, stream=True
            )
            answers.append([chunk.choices[0].delta.content for chunk, _ in zip(stream, range(8), strict=False)])
            port = str(server.base_url.port)
            [process] = [each for each in psutil.Process().children() if port in each.cmdline()]
            processes = [process, *process.children(recursive=True)]
            for each in processes:
                each.kill()
            _, alive = psutil.wait_procs(processes, timeout=60)
            assert not alive
    assert any(answers[0])
    assert answers[0] == answers[1]
