"""Starts processes on the CPU, several as `accelerate launch` does on GPUs; or does without one."""

import os
import subprocess
import sys
import textwrap

ENVIRONMENT = os.environ | {
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
# What would be a default, but for a line on each; and any free port.
DEFAULTS = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
LONGEST = 300  # seconds, so that a test that hangs ends


def launched(count, *words):
    """The command that runs a script or `-m MODULE` in so many processes."""
    if count == 1:
        return [sys.executable, *map(str, words)]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
    return [*start, *DEFAULTS, *map(str, words)]


def run(command, wait=None, **options):
    """Run a command to its end; wait: the seconds a process may do nothing."""
    environment = ENVIRONMENT | ({"VTR_RANK_WAIT": str(wait)} if wait else {})
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST, **options
    )


def call(main, words, monkeypatch, capture):
    """Call the function behind a command, which is there sooner than a process, and return what `run` would.

    capture: pytest's fixture that captures what is said.
    """
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    status, last = 0, ""
    try:
        status = main() or 0
    except SystemExit as stop:
        status, last = (1, stop.code) if isinstance(stop.code, str) else (stop.code or 0, "")
    said = capture.readouterr()
    return subprocess.CompletedProcess(words, status, said.out, said.err + last)


def scripted(tmp_path, count, body):
    """Start so many processes of a script with its own number `me`, and `say`, which writes a line in one piece."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, time\nfrom strategy.distributed import collectives, processes, watchdog\n"
        "from strategy.evaluation.requests import answer_own\nme = processes.rank()\n"
        "say = lambda text: os.write(1, f'{text}\\n'.encode())\n" + textwrap.dedent(body)
    )
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), str(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *words], env=ENVIRONMENT, text=True, **pipes)


def told(process):
    """The exit status, and the lines of the script's own."""
    out, errors = process.communicate(timeout=120)
    return process.returncode, [line for line in (out + errors).splitlines() if line.startswith(("said", "rank "))]
