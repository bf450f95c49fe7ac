"""Runs a module or a script, one of whose processes dies or hangs: faulty.py die|hang RANK QUESTION NAME ARGUMENTS...

QUESTION: at how many questions begun, from 0.
"""

import itertools
import os
import runpy
import signal
import sys
import time

import libyaml  # noqa: F401

from strategy.distributed import processes, watchdog
from strategy.evaluation import resume

kind, rank, question, name = sys.argv[1:5]
sys.argv = sys.argv[4:]
get_on, begun = watchdog.heartbeat, itertools.count()


def beat():
    if next(begun) == int(question) and processes.rank() == int(rank):
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)
    get_on()


watchdog.heartbeat = beat
resume.FLUSH_EVERY = 1
if name.endswith(".py"):
    runpy.run_path(name, run_name="__main__")
else:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
