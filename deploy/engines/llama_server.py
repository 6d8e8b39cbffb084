#!/usr/bin/env python3
"""Serve one GGUF file with llama.cpp's own HTTP server (PyPI package `xllamacpp`) and announce it.

    python llama_server.py --model tiny.gguf --slots 2 --ctx 2048
    python llama_server.py --model tiny.gguf --pool-id pool-0 --replica-id r0 \
        --handoff .runtime/engines/pool-0-r0.json

Prints `listening URL` once the model is loaded and the HTTP API has answered, then serves until
SIGTERM or SIGINT. With --handoff it writes that file just before and takes it away at the end;
slots, context and model in it are what the engine answered, not what the flags asked for.
A signal during the load, which holds the interpreter, ends the process as that signal does.

Deliberately not known here: who reads the handoff file, what a GPU is, how to start again after
a crash. SIGKILL leaves the file behind; a reader sees by its `pid` that it is stale.

It ends with the thread that started it (Linux watches the thread, not its process): start it
from one that lives as long as the engine should, or give --keep.
"""
import argparse
import contextlib
import ctypes
import http.client
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
PR_SET_PDEATHSIG = 1  # linux/prctl.h
HTTP_SPARE = 64       # requests that may wait for a slot while /health still answers at once


class Refusal(Exception):
    """Why nothing is served, as one line that says what to do about it."""


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise Refusal(f"{message}; --help lists the flags")


def whole(lowest: int, highest: int):
    def parse(word: str) -> int:
        if not word.isascii() or not word.isdigit() or not lowest <= int(word) <= highest:
            raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from {lowest} to {highest}")
        return int(word)
    return parse


def identifier(word: str) -> str:
    if not IDENTIFIER.fullmatch(word):
        raise argparse.ArgumentTypeError(
            f"{word!r} is not 1-63 characters of A-Z a-z 0-9 . _ - that begin with a letter or digit")
    return word


def read_options(arguments: list[str]) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--model", type=Path, required=True, metavar="PATH", help="the GGUF file to serve")
    flag("--mmproj", type=Path, metavar="PATH", help="the projector that lets the model see or hear")
    flag("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    flag("--port", type=whole(0, 65535), default=0, help="0, the default: the system picks a free one")
    flag("--alias", metavar="NAME", help="the model's name in /v1/models (default: the file's name)")
    flag("--slots", type=whole(1, 256), default=2, help="requests decoded in parallel (default %(default)s)")
    flag("--ctx", type=whole(1, 1 << 24), default=2048, help="context tokens per slot (default %(default)s)")
    flag("--threads", type=whole(1, 1024), default=1, help="threads for decoding (default %(default)s)")
    flag("--embeddings", action="store_true", help="answer /v1/embeddings too, pooled by their mean")
    flag("--handoff", type=Path, metavar="FILE", help="announce the engine in FILE while it serves")
    flag("--pool-id", type=identifier, metavar="ID", help="required with --handoff")
    flag("--replica-id", type=identifier, metavar="ID", help="required with --handoff")
    flag("--keep", action="store_true", help="go on serving when the process that started this one ends")
    options = parser.parse_args(arguments)
    if options.handoff:
        check_handoff(options.handoff, options.pool_id, options.replica_id)
    return options


def check_handoff(path: Path, pool_id: str | None, replica_id: str | None) -> None:
    if not (pool_id and replica_id):
        raise Refusal("--handoff needs --pool-id and --replica-id")
    if path.name != f"{pool_id}-{replica_id}.json":
        raise Refusal(f"the handoff file must be named {pool_id}-{replica_id}.json, not {path.name}")
    if not path.parent.is_dir():
        raise Refusal(f"there is no directory {path.parent} for the handoff file; create it first")


def check_model(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise Refusal(f"cannot read the model file {path} ({error.strerror}); check --model") from error
    if magic != b"GGUF":
        raise Refusal(f"{path} is not a GGUF file; give --model a file in llama.cpp's format")


def end_with_parent(parent: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise Refusal(f"cannot tie this process to its parent ({os.strerror(ctypes.get_errno())}); give --keep")
    # The kernel reports only deaths after the call above; one before it shows as a new parent.
    if os.getppid() != parent:
        raise Refusal("the process that started this one is gone; give --keep to serve without it")


def load_package():
    # Read once, at import. Otherwise idle OpenMP threads spin and starve their neighbours on the same cores.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        import xllamacpp
    except ImportError as error:
        raise Refusal(f"cannot import xllamacpp ({error}); run: {sys.executable} -m pip install xllamacpp") from error
    return xllamacpp


def parameters(package, options: argparse.Namespace):
    wanted = package.CommonParams()
    wanted.model.path = str(options.model)
    if options.mmproj:
        check_model(options.mmproj)
        wanted.mmproj.path = str(options.mmproj)
    wanted.hostnames = [options.host]
    wanted.port = options.port
    wanted.model_alias = {options.alias or options.model.name}
    wanted.n_parallel = options.slots
    wanted.n_ctx = options.ctx * options.slots  # the engine divides it over its slots
    wanted.fit_params = False                   # the context asked for, whatever memory is free
    wanted.cpuparams.n_threads = options.threads
    wanted.cpuparams_batch.n_threads = options.threads
    # With the default (slots + 4) a few waiting requests make even /health wait; a busy engine looks dead.
    wanted.n_threads_http = options.slots + HTTP_SPARE
    wanted.endpoint_metrics = wanted.endpoint_slots = wanted.endpoint_props = True
    wanted.ui = False
    if options.embeddings:
        wanted.embedding = True
        wanted.pooling_type = package.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    wanted.verbosity = 1  # errors only, on stderr
    return wanted


@contextlib.contextmanager
def captured_stderr():
    """Collect what native code writes to descriptor 2, so that a failure is one line of ours."""
    original = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(original, 2)
            os.close(original)


def first_error(log) -> str:
    """The engine's first error line, which names the cause; later ones only say who gave up."""
    for _ in range(100):  # a thread of the engine writes the log and may lag behind
        text = os.pread(log.fileno(), 1 << 16, 0).decode("utf-8", "replace")  # not moving the writer's offset
        found = re.search(r"^\S+ E (.+)$", text, re.MULTILINE)
        if found:
            return found[1]
        time.sleep(0.01)
    return "it gave no reason"


def start_engine(package, options: argparse.Namespace):
    """Return the engine with its model loaded; its own threads answer HTTP from then on."""
    with captured_stderr() as log:
        try:
            return package.Server(parameters(package, options))
        except Exception as error:  # the binding raises a bare RuntimeError for every cause
            reason = first_error(log)
            if "bind" in reason:
                reason = f"cannot listen on {options.host}:{options.port}, in use or not here; give another --port"
                raise Refusal(reason) from error
            raise Refusal(f"the engine cannot load {options.model} ({reason}); get the file again") from error


def ask(url: str, path: str) -> dict:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10.0)  # idle, on this machine
    try:
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            return json.load(answer)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Refusal(f"the engine at {url} does not answer {path} ({error}); start it again") from error


def announcement(package, options: argparse.Namespace, url: str) -> dict:
    props, models = ask(url, "/props"), ask(url, "/v1/models")
    return {
        "pool_id": options.pool_id, "replica_id": options.replica_id,
        "engine": "llamacpp", "engine_version": f"xllamacpp-{package.__version__}",
        "url": url, "pid": os.getpid(), "slots": props["total_slots"],
        "model_ref": models["data"][0]["id"], "ctx_max": props["default_generation_settings"]["n_ctx"],
    }


def write_whole(path: Path, content: dict) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")  # readers pass over names with a dot
    try:
        draft.write_text(json.dumps(content) + "\n", "utf-8")
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise Refusal(f"cannot write the handoff file {path} ({error.strerror}); check its directory") from error


def withdraw(path: Path) -> None:
    # A later process may have announced itself under the same name; its file is not ours to remove.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json.loads(path.read_text("utf-8")).get("pid") == os.getpid():
            path.unlink()


def serve(arguments: list[str], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the load to end
    options = read_options(arguments)
    if not options.keep:
        end_with_parent(parent)
    check_model(options.model)
    package = load_package()
    engine = start_engine(package, options)
    url = engine.listening_address
    ask(url, "/health")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.handoff:
        write_whole(options.handoff, announcement(package, options, url))
    with contextlib.suppress(BrokenPipeError):
        print("listening", url, flush=True)
    stop.wait()
    if options.handoff:
        withdraw(options.handoff)
    os._exit(0)  # a return would drop the engine, and its destructor waits half a minute for open streams


def main() -> None:
    parent = os.getppid()
    try:
        serve(sys.argv[1:], parent)
    except Refusal as refusal:
        print(f"llama_server: {' '.join(str(refusal).split())}", file=sys.stderr, flush=True)
        os._exit(2)  # the engine's threads do not stop by themselves


if __name__ == "__main__":
    main()
