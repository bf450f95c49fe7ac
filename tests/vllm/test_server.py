"""The OpenAI server with the plug-in, over two processes that share the model, and a real client."""

import base64
import io
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from engines import CHECKPOINTS, Reference, questions

VTR = '{"vtr": {"strategy": "clse", "retain_ratio": 0.112}}'
MODEL = str(CHECKPOINTS / "shapes-qwen2")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A client of a server."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", MODEL, "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 26)]
    # The tower's three heads cannot be split.
    command += ["--tensor-parallel-size", "2", "--mm-encoder-tp-mode", "data", "--additional-config", VTR]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        wait(client, process, log)
        yield client
    finally:
        process.terminate()
        process.wait(60)


def wait(client, process, log, seconds=300):
    """Wait until a server answers."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


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
    vtr = {"strategy": "clse", "retain_ratio": 0.112}
    texts = [question.text.partition("<|vision_end|>")[2].partition("<|im_end|>")[0] for question in given]
    decode = reference.processor.tokenizer.decode
    expected = [decode(reference.answer(each, vtr).tokens, skip_special_tokens=True) for each in given]

    def ask(number):
        stream = server.chat.completions.create(
            model=MODEL, messages=asked(given[number], texts[number]), max_tokens=12, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == expected


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
