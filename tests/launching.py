"""Starts several processes on the CPU, as `accelerate launch` does on GPUs."""

import os
import subprocess
import sys

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
