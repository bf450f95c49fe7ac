"""Measure how vLLM answers with the plug-in, and beside it unpruned: answers a second, first tokens, requests at once.

Each way runs in processes of its own: offline, in a small cache, and (`--measures served`) behind an OpenAI server
under vLLM's load generator.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.report import serving_table
from strategy.evaluation.files import write_whole

BYTES = 4 << 30  # of the cache in which requests at once are counted


def ways(asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what `additional_config` is in each way, by the way's name."""
    budgets = [("keep_tokens", budget) for budget in asked.keep_tokens]
    budgets += [("retain_ratio", budget) for budget in asked.retain_ratio]
    found: dict[str, dict[str, Any]] = {"unpruned": {}}
    for name, budget in budgets:
        found[f"{asked.strategy} {budget:g}"] = {"vtr": {"strategy": asked.strategy, name: budget}}
    return found


def settings(asked: argparse.Namespace, additional_config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`."""
    return {
        "model": asked.model,
        "dtype": asked.dtype,
        "load_format": asked.load_format,
        "max_model_len": 4096,
        "limit_mm_per_prompt": {"image": 1},
        "additional_config": additional_config,
        # All ways alike: what is measured is a first look at each picture.
        "enable_prefix_caching": False,
        **asked.more,
    }


def prompts(asked: argparse.Namespace, count: int, seed: int) -> list[dict[str, Any]]:
    """Return prompts with pictures of random pixels, all of them different."""
    from transformers import AutoProcessor  # noqa: PLC0415  only in the process that measures

    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    template = AutoProcessor.from_pretrained(asked.model).apply_chat_template
    text = template([{"role": "user", "content": content}], add_generation_prompt=True)
    size = (count, asked.picture, asked.picture, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return [{"prompt": text, "multi_modal_data": {"image": Image.fromarray(each)}} for each in pixels]


def offline(asked: argparse.Namespace, additional_config: dict[str, Any]) -> dict[str, Any]:
    """Measure `LLM.generate`: with new pictures, with pictures whose preparation is cached, and token by token."""
    from vllm import LLM, SamplingParams  # noqa: PLC0415  only in the process that measures

    llm = LLM(**settings(asked, additional_config))
    sampling = SamplingParams(max_tokens=asked.new, ignore_eos=True, temperature=0)

    def seconds(given: Sequence[Any], params: Any) -> float:
        since = time.perf_counter()
        llm.generate(given, params, use_tqdm=False)
        return time.perf_counter() - since

    seconds(prompts(asked, 8, seed=1), sampling)
    asked_once = prompts(asked, asked.prompts, seed=2)
    found: dict[str, Any] = {"cold": asked.prompts / seconds(asked_once, sampling)}
    found["warm"] = asked.prompts / seconds(asked_once, sampling)
    alone = asked_once[-1:]
    short, long = (
        min(seconds(alone, SamplingParams(max_tokens=new, ignore_eos=True, temperature=0)) for _ in range(3))
        for new in (1, 129)
    )
    return found | {"first": 1000 * short, "token": 1000 * (long - short) / 128}


def at_once(asked: argparse.Namespace, additional_config: dict[str, Any]) -> dict[str, Any]:
    """Count how many requests run at once in a cache that is too small for all."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams  # noqa: PLC0415  after the environment is set

    small = {"kv_cache_memory_bytes": BYTES, "enforce_eager": True, "max_num_seqs": 256}
    llm = LLM(**settings(asked, additional_config) | small)
    engine, most = llm.llm_engine, 0
    scheduler = engine.engine_core.engine_core.scheduler
    for number, prompt in enumerate(prompts(asked, min(asked.prompts, 96), seed=3)):
        engine.add_request(str(number), prompt, SamplingParams(max_tokens=64, ignore_eos=True, temperature=0))
    while engine.has_unfinished_requests():
        engine.step()
        most = max(most, len(scheduler.running))
    return {"at_once": most}


@contextmanager
def serving(asked: argparse.Namespace, additional_config: dict[str, Any], seconds: float = 1800) -> Iterator[str]:
    """Run `vllm serve` for the length of a `with`, and return its address.

    Raises:
        RuntimeError: The server ended, or did not answer within so many seconds.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    given = settings(asked, additional_config)
    command = ["vllm", "serve", given.pop("model"), "--port", str(port)]
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            address, until = f"http://127.0.0.1:{port}", time.monotonic() + seconds
            while not answers(address):
                if server.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"vllm serve does not answer: {log.read()[-4000:].decode(errors='replace')}")
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()


def answers(address: str) -> bool:
    """Return whether a server is up."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=1):
            return True
    except OSError:
        return False


def served(asked: argparse.Namespace, additional_config: dict[str, Any]) -> dict[str, Any]:
    """Measure a server with `vllm bench serve`: all requests at once, pictures of random pixels."""
    with serving(asked, additional_config) as address, tempfile.TemporaryDirectory() as folder:
        command = ["vllm", "bench", "serve", "--base-url", address, "--model", asked.model]
        command += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--dataset-name", "random-mm"]
        command += ["--random-input-len", "40", "--random-output-len", str(asked.new), "--ignore-eos"]
        command += ["--random-mm-base-items-per-request", "1", "--random-mm-num-mm-items-range-ratio", "0"]
        command += ["--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}']
        command += ["--random-mm-bucket-config", f"{{({asked.picture}, {asked.picture}, 1): 1.0}}"]
        command += ["--num-prompts", str(asked.prompts), "--num-warmups", "8", "--max-concurrency", "64"]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "found.json", "--disable-tqdm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"vllm bench serve ended: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        found = json.loads((Path(folder) / "found.json").read_text())
    kept = {"request_throughput": "served", "median_ttft_ms": "served_first", "p99_ttft_ms": "served_first_99"}
    return {ours: found[theirs] for theirs, ours in kept.items()}


MEASURES = {"offline": offline, "at_once": at_once, "served": served}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a hub id, or a folder")
    parser.add_argument("--strategy", default="clse")
    parser.add_argument("--keep_tokens", nargs="*", type=int, default=[], help="a way for each budget in tokens")
    parser.add_argument("--retain_ratio", nargs="*", type=float, default=[], help="a way for each budget as a ratio")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--picture", type=int, default=336, help="pixels of a picture's side")
    parser.add_argument("--measures", nargs="*", choices=MEASURES, default=["offline", "at_once"])
    parser.add_argument("--load_format", default="auto", help="dummy: random weights")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--more", type=json.loads, default={}, help="further arguments of vllm.LLM, in JSON")
    parser.add_argument("--output", default="results/serving")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(asked: argparse.Namespace, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each way, each measure of it in a process of its own."""
    for name, additional_config in ways(asked).items():
        row: dict[str, Any] = {"name": name}
        for kind in asked.measures:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "row.json"
                one = json.dumps([kind, additional_config, str(file)])
                subprocess.run([sys.executable, "-m", "benchmarks.serving", *arguments, "--one", one], check=True)
                row |= json.loads(file.read_text())
        yield row


def main(arguments: list[str] | None = None) -> None:
    """Measure all ways, print a table, and write it."""
    given = sys.argv[1:] if arguments is None else arguments
    asked = parse(given)
    if asked.one:
        kind, additional_config, file = asked.one
        Path(file).write_text(json.dumps(MEASURES[kind](asked, additional_config)))
        return
    output = Path(asked.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in measure(asked, given):
        rows.append(row)
        # Each row as it comes, so that what was measured is not lost.
        write_whole(output / "serving.json", json.dumps(rows, indent=2).encode())
        write_whole(output / "serving.md", serving_table(rows).encode())
        print(serving_table(rows))


if __name__ == "__main__":
    main()
