"""Anthropic's own client. `CLUSTER_IS_FAKE`: over fake engines, where its streams are asserted event by event;
over the real one the version at hand forgets the first event now and then."""

import os

import anthropic

from cases import KEY, MODEL, PATIENCE_SECONDS, ROOT, case, eventually, raises, run

IS_FAKE = os.environ.get("CLUSTER_IS_FAKE") == "true"
HELLO = [{"role": "user", "content": "hello there"}]

client = anthropic.Anthropic(base_url=ROOT, api_key=KEY, max_retries=0, timeout=PATIENCE_SECONDS)


def of_fake(function):
    return case(function) if IS_FAKE else function


def of_real(function):
    return function if IS_FAKE else case(function)


@of_real
def message():
    answer = client.messages.create(model=MODEL, max_tokens=6, messages=HELLO, system="be brief")
    assert answer.content[0].text and answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 6, answer
    assert answer._request_id, "the client names the request in its reports"


@of_real
def count_tokens():
    assert client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens > 0


@of_real
def bearer():
    """A gateway's key may be given as a token too."""
    other = anthropic.Anthropic(base_url=ROOT, auth_token=KEY, max_retries=0)
    assert other.messages.create(model=MODEL, max_tokens=1, messages=HELLO).content


@of_fake
def stream_events():
    with client.messages.stream(model=MODEL, max_tokens=4, messages=HELLO) as stream:
        kinds = [event.type for event in stream if event.type != "text"]
        final = stream.get_final_message()
    assert kinds == ["message_start", "content_block_start"] + ["content_block_delta"] * 4 + [
        "content_block_stop", "message_delta", "message_stop"], kinds
    assert final.content[0].text == "w0 w1 w2 w3 " and final.stop_reason == "max_tokens", final
    assert final.usage.output_tokens == 4, final.usage


@of_fake
def stream_text():
    with client.messages.stream(model=MODEL, max_tokens=3, messages=HELLO) as stream:
        assert list(stream.text_stream) == ["w0 ", "w1 ", "w2 "]
        assert stream.request_id, "the client names the request in its reports"


@of_fake
async def stream_async():
    async with anthropic.AsyncAnthropic(base_url=ROOT, api_key=KEY, max_retries=0) as clients:
        async with clients.messages.stream(model=MODEL, max_tokens=3, messages=HELLO) as stream:
            assert [piece async for piece in stream.text_stream] == ["w0 ", "w1 ", "w2 "]


@of_fake
def stream_raw():
    events = list(client.messages.create(model=MODEL, max_tokens=2, messages=HELLO, stream=True))
    assert [event.type for event in events][-1] == "message_stop", events


@case
def wrong_key():
    stranger = client.with_options(api_key="no-key-of-this-cluster")
    error = raises(anthropic.AuthenticationError, stranger.messages.create, model=MODEL, max_tokens=1, messages=HELLO)
    assert error.body["error"]["type"] == "authentication_error", error.body


@case
def wrong_model():
    error = raises(anthropic.NotFoundError, client.messages.create, model="none", max_tokens=1, messages=HELLO)
    assert error.body["type"] == "error" and error.body["error"]["type"] == "not_found_error", error.body


@case
def raw_response():
    raw = client.messages.with_raw_response.create(model=MODEL, max_tokens=2, messages=HELLO, stream=IS_FAKE)
    assert raw.headers["x-llorch-task-id"] and raw.headers["x-llorch-node"].startswith("gpu-node-"), raw.headers
    assert raw.request_id == raw.headers["x-llorch-task-id"], "what the client names is the task"


@case
def departure():
    import httpx2

    with client.messages.stream(model=MODEL, max_tokens=8000, messages=HELLO) as stream:
        for _ in stream:
            break
    tasks = lambda: httpx2.get(f"{ROOT}/v2/tasks", headers={"x-api-key": KEY, "authorization": f"Bearer {KEY}"}).json()["tasks"]
    eventually("nothing runs", lambda: not [task for task in tasks() if task["state"] in ("queued", "running")])


run()
