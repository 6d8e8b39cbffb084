"""What the cases of all clients share: where the cluster is, and how a run is reported.

A case is a function whose name says what it shows; it fails by raising. Each prints one line, and the
run's status says whether all passed. Names on the command line choose cases.
"""

import asyncio
import inspect
import os
import sys
import time
import traceback

ROOT = os.environ["CLUSTER_URL"]
KEY = os.environ["CLUSTER_KEY"]
MODEL = os.environ["CLUSTER_MODEL"]
V1 = f"{ROOT}/v1"
# Of clients that are to see a failure at once.
PATIENCE_SECONDS = 60.0

_cases = []


def case(function):
    _cases.append(function)
    return function


def eventually(what, look, seconds=15.0, pause=0.05):
    """Waits until `look` returns something; raises with `what` otherwise. Both spans in seconds."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        found = look()
        if found:
            return found
        time.sleep(pause)
    raise AssertionError(f"not within {seconds} s: {what}")


def raises(kind, function, *arguments, **named):
    """The error of this kind that the call ends with."""
    try:
        result = function(*arguments, **named)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} but {result!r}")


def run():
    wanted = sys.argv[1:]
    chosen = [function for function in _cases if not wanted or function.__name__ in wanted]
    failed = 0
    for function in chosen:
        begun = time.monotonic()
        try:
            asyncio.run(function()) if inspect.iscoroutinefunction(function) else function()
            verdict = "ok"
        except Exception as error:
            traceback.print_exc()
            verdict, failed = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}", failed + 1
        print(f"case {function.__name__} {(time.monotonic() - begun) * 1000:.0f} ms {verdict}", flush=True)
    print(f"cases {len(chosen)} failed {failed}", flush=True)
    sys.exit(1 if failed or not chosen else 0)
