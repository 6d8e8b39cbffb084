"""OpenAI's own client, as it comes from the package index, over two nodes with the real engine."""

import asyncio
import json
import os
import threading
import time

import httpx2
import openai
from pydantic import BaseModel

from cases import KEY, MODEL, PATIENCE_SECONDS, ROOT, V1, case, eventually, raises, run

EMBEDDINGS_MODEL = os.environ["CLUSTER_EMBEDDINGS_MODEL"]
ENGINES = os.environ["CLUSTER_ENGINES"].split(",")
# The slots of all engines of the model, and how many more may wait.
SLOTS = int(os.environ["CLUSTER_SLOTS"])
QUEUE = int(os.environ["CLUSTER_QUEUE"])

HELLO = [{"role": "user", "content": "hello there"}]
# Longer than any case takes: half a minute where nothing else is to be done.
LONG = {"model": MODEL, "messages": HELLO, "max_tokens": 8000, "temperature": 0}

client = openai.OpenAI(base_url=V1, api_key=KEY, max_retries=0, timeout=PATIENCE_SECONDS)
root = httpx2.Client(base_url=ROOT, headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE_SECONDS)


class Weather(BaseModel):
    sunny: bool


def asynchronous():
    return openai.AsyncOpenAI(base_url=V1, api_key=KEY, max_retries=0, timeout=PATIENCE_SECONDS)


def busy():
    """Requests that the engines work on, by their own word."""
    slots = [slot for url in ENGINES for slot in httpx2.get(f"{url}/slots", timeout=10.0).json()]
    return sum(slot["is_processing"] for slot in slots)


def reserved():
    """Slots that the control plane holds for tasks."""
    nodes = root.get("/v2/nodes").json()["nodes"]
    pools = [pool for node in nodes for pool in node["pools"] if MODEL in pool["report"]["models"]]
    return sum(pool["slots_total"] - pool["slots_free"] for pool in pools)


def all_is_idle():
    # Engines are asked last and seldom: llama.cpp notices the caller of a whole answer only after a second
    # in which it answers nobody.
    eventually("no slot is taken", lambda: reserved() == 0)
    eventually("the engines work on nothing", lambda: busy() == 0, pause=1.5)


def text(choice):
    return choice.message.content


def streamed(stream):
    """The text, the reason to finish and the usage of a chat's stream."""
    words, reasons, usage = [], [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            words.append(choice.delta.content or "")
            reasons += [choice.finish_reason] if choice.finish_reason else []
    return "".join(words), reasons, usage


@case
def chat():
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, temperature=0)
    assert text(answer.choices[0]) and answer.choices[0].finish_reason == "length", answer
    assert answer.usage.completion_tokens == 8 and answer.usage.prompt_tokens > 0, answer.usage
    assert answer._request_id, "the client names the request in its reports"


@case
def chat_stream():
    wanted = dict(model=MODEL, messages=HELLO, max_tokens=8, temperature=0, seed=1)
    whole = client.chat.completions.create(**wanted)
    stream = client.chat.completions.create(**wanted, stream=True, stream_options={"include_usage": True})
    words, reasons, usage = streamed(stream)
    assert words == text(whole.choices[0]) and reasons == ["length"], (words, reasons)
    assert usage.completion_tokens == 8, usage
    words, reasons, usage = streamed(client.chat.completions.create(**wanted, stream=True))
    assert reasons == ["length"] and usage is None, "what was not asked for is not added"


@case
async def chat_async():
    async with asynchronous() as clients:
        wanted = dict(model=MODEL, messages=HELLO, max_tokens=6, temperature=0)

        async def stream():
            words = []
            async for chunk in await clients.chat.completions.create(**wanted, stream=True):
                words += [choice.delta.content or "" for choice in chunk.choices]
            return "".join(words)

        whole, *streams = await asyncio.gather(clients.chat.completions.create(**wanted), *[stream() for _ in range(5)])
        assert streams == [text(whole.choices[0])] * 5, streams


@case
def chat_stream_helper():
    wanted = dict(model=MODEL, messages=HELLO, max_tokens=200, temperature=0, response_format=Weather)
    with client.chat.completions.stream(**wanted) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and isinstance(final.choices[0].message.parsed, Weather), kinds


@case
def completion():
    wanted = dict(model=MODEL, prompt="one day", max_tokens=6, temperature=0)
    whole = client.completions.create(**wanted)
    stream = client.completions.create(**wanted, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text, whole


@case
def responses():
    answer = client.responses.create(model=MODEL, input="hello", max_output_tokens=4, temperature=0)
    assert answer.output_text and answer.status == "completed", answer
    stream = client.responses.create(model=MODEL, input="hello", max_output_tokens=4, temperature=0, stream=True)
    events = list(stream)
    assert events[0].type == "response.created" and events[-1].type == "response.completed", events
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text, deltas


TOOLS = [{
    "type": "function",
    "function": {"name": "weather", "description": "what it is like", "parameters": Weather.model_json_schema()},
}]


def tool_request():
    """The tiny model never chooses to call: the mark of a call is made its best choice."""
    mark = root.post("/tokenize", json={"model": MODEL, "content": "<|turn|>", "parse_special": True}).json()["tokens"][-1]
    return dict(
        model=MODEL, messages=HELLO, max_tokens=200, temperature=0, tools=TOOLS, tool_choice="required",
        parallel_tool_calls=False, logit_bias={str(mark): 100},
    )


@case
def tools():
    wanted = tool_request()
    first = client.chat.completions.create(**wanted)
    (call,) = first.choices[0].message.tool_calls
    assert call.function.name == "weather" and first.choices[0].finish_reason == "tool_calls", first
    assert isinstance(Weather.model_validate_json(call.function.arguments).sunny, bool), call
    # What it is told goes back to it.
    told = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    after = client.chat.completions.create(
        model=MODEL, messages=[*HELLO, first.choices[0].message, told], tools=TOOLS, max_tokens=4, temperature=0)
    assert text(after.choices[0]), after


@case
def tools_stream():
    arguments, names, reasons = [], [], []
    for chunk in client.chat.completions.create(**tool_request(), stream=True):
        for choice in chunk.choices:
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for call in choice.delta.tool_calls or []:
                names += [call.function.name] if call.function.name else []
                arguments.append(call.function.arguments or "")
    assert names == ["weather"] and reasons == ["tool_calls"], (names, reasons)
    Weather.model_validate_json("".join(arguments))


@case
def logprobs():
    wanted = dict(model=MODEL, messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**wanted).choices[0]
    tokens = whole.logprobs.content
    assert len(tokens) == 3 and all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens), tokens
    stream = client.chat.completions.create(**wanted, stream=True)
    parts = [part for chunk in stream for choice in chunk.choices if choice.logprobs for part in choice.logprobs.content]
    assert [part.token for part in parts] == [token.token for token in tokens], parts


@case
def json_schema():
    answer = client.chat.completions.parse(
        model=MODEL, messages=HELLO, max_tokens=200, temperature=0, response_format=Weather)
    assert isinstance(answer.choices[0].message.parsed, Weather), answer
    plain = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=200, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "w", "schema": Weather.model_json_schema(), "strict": True}})
    assert list(json.loads(text(plain.choices[0]))) == ["sunny"], plain


@case
def embeddings():
    texts = ["a small bird", "the sea"]
    # The client asks for base64 by itself, and reads it.
    plain = client.embeddings.create(model=EMBEDDINGS_MODEL, input=texts)
    floats = client.embeddings.create(model=EMBEDDINGS_MODEL, input=texts, encoding_format="float")
    packed = client.embeddings.create(model=EMBEDDINGS_MODEL, input=texts, encoding_format="base64")
    assert [len(one.embedding) for one in plain.data] == [64, 64], plain
    assert isinstance(packed.data[0].embedding, str), packed
    for one, other in zip(plain.data, floats.data, strict=True):
        assert one.index == other.index
        assert max(abs(a - b) for a, b in zip(one.embedding, other.embedding, strict=True)) < 1e-6
    assert plain.usage.prompt_tokens > 0, plain.usage


@case
async def embeddings_async():
    async with asynchronous() as clients:
        answer = await clients.embeddings.create(model=EMBEDDINGS_MODEL, input="one")
        assert len(answer.data[0].embedding) == 64


@case
def models():
    names = [model.id for model in client.models.list()]
    assert MODEL in names and EMBEDDINGS_MODEL in names, names
    one = client.models.retrieve(MODEL)
    assert one.id == MODEL and one.object == "model" and one.created > 0, one
    error = raises(openai.NotFoundError, client.models.retrieve, "none/such:1")
    assert error.code == "model_not_found" and error.request_id, (error.body, error.request_id)


@case
def wrong_key():
    stranger = client.with_options(api_key="no-key-of-this-cluster")
    for call in (stranger.models.list, lambda: stranger.chat.completions.create(model=MODEL, messages=HELLO)):
        error = raises(openai.AuthenticationError, call)
        assert error.status_code == 401 and error.code == "invalid_api_key", error.body


@case
def wrong_model():
    for stream in (False, True):
        error = raises(openai.NotFoundError, client.chat.completions.create, model="none", messages=HELLO, stream=stream)
        assert error.code == "model_not_found" and error.type == "invalid_request_error", error.body
        assert error.request_id, "an error names its request"


@case
def wrong_request():
    deep = {"a": {}}
    for _ in range(100):
        deep = {"a": deep}
    error = raises(
        openai.BadRequestError, client.chat.completions.create, model=MODEL, messages=HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "deep", "schema": deep}})
    assert error.code == "INVALID_PARAMS" and error.param, error.body
    # The engine's own refusal is its own word.
    error = raises(openai.BadRequestError, client.chat.completions.create, model=MODEL, messages=[{"role": "user", "content": "day " * 9000}])
    assert error.type == "exceed_context_size_error", error.body
    error = raises(openai.APIStatusError, client.post, "/nothing", cast_to=object, body={})
    assert error.status_code == 404 and error.code == "NOT_FOUND", error.body


@case
def raw_responses():
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=2)
    task = raw.headers["x-llorch-task-id"]
    assert raw.headers["x-request-id"] == task == raw.request_id and raw.headers["x-llorch-node"].startswith("gpu-node-")
    assert text(raw.parse().choices[0]) and raw.retries_taken == 0
    with client.chat.completions.with_streaming_response.create(model=MODEL, messages=HELLO, max_tokens=2, stream=True) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream") and raw.headers["x-llorch-task-id"] != task
        lines = [line for line in raw.iter_lines() if line]
    assert lines[-1] == "data: [DONE]", lines
    view = root.get(f"/v2/tasks/{task}").json()
    assert view["state"] == "completed" and view["model_ref"] == MODEL, view


@case
def headers_of_ours():
    named = {"X-LLORCH-Priority": "batch", "X-Session-Id": "s-1", "X-Correlation-Id": "order-7", "X-Request-Timeout-Ms": "30000"}
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=1, extra_headers=named)
    assert raw.headers["x-correlation-id"] == "order-7"
    assert root.get(f"/v2/tasks/{raw.headers['x-llorch-task-id']}").json()["priority"] == "batch"


@case
def deadline():
    requests = []
    counting = httpx2.Client(event_hooks={"request": [requests.append]})
    patient = openai.OpenAI(base_url=V1, api_key=KEY, max_retries=3, http_client=counting, timeout=PATIENCE_SECONDS)
    error = raises(openai.InternalServerError, patient.chat.completions.create, **LONG, extra_headers={"X-Request-Timeout-Ms": "1"})
    assert error.status_code == 504 and error.code == "DEADLINE_EXCEEDED", error.body
    assert len(requests) == 1, "a deadline that has passed is not tried again by the client"
    all_is_idle()


@case
def timeout_of_the_client():
    raises(openai.APITimeoutError, client.with_options(timeout=0.2).chat.completions.create, **LONG)
    all_is_idle()


@case
def departure():
    stream = client.chat.completions.create(**LONG, stream=True)
    next(iter(stream))
    eventually("its slot is taken", lambda: reserved() == 1)
    stream.close()
    all_is_idle()


@case
async def departures_async():
    async with asynchronous() as clients:
        async def begin():
            async for _ in await clients.chat.completions.create(**LONG, stream=True):
                pass

        # Some run, and some wait.
        running = [asyncio.create_task(begin()) for _ in range(SLOTS + QUEUE)]
        await asyncio.sleep(0.3)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    all_is_idle()


@case
def full_queue():
    """The queue is filled by tasks of ours; whoever comes then is refused, and the client comes back."""
    streams = [client.chat.completions.create(**LONG, stream=True) for _ in range(SLOTS)]
    fillers = []

    def fill():
        with client.chat.completions.with_streaming_response.create(**LONG, stream=True) as answer:
            fillers.append(answer)

    waiting = [threading.Thread(target=fill) for _ in range(QUEUE)]
    for one in waiting:
        one.start()
    count = lambda: len(root.get("/v2/tasks", params={"state": "queued"}).json()["tasks"])
    eventually("the queue is full", lambda: count() == QUEUE)
    error = raises(openai.RateLimitError, client.chat.completions.create, model=MODEL, messages=HELLO, max_tokens=1)
    assert error.code == "rate_limit_exceeded" and error.type == "rate_limit_error", error.body
    wait = int(error.response.headers["retry-after"])
    assert 1 <= wait <= 120 and int(error.response.headers["x-backoff-ms"]) > 0, error.response.headers

    leaving = threading.Timer(0.5, lambda: [stream.close() for stream in streams])
    leaving.start()
    begun = time.monotonic()
    raw = client.with_options(max_retries=10).chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=1)
    assert raw.retries_taken >= 1 and text(raw.parse().choices[0]), raw.retries_taken
    assert time.monotonic() - begun >= min(wait, 1), "it waits as long as it was told"
    for one in waiting:
        one.join()
    all_is_idle()


run()
