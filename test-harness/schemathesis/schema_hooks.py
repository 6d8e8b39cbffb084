"""What schemathesis is told of these two daemons beyond their documents."""

import json
import re

import schemathesis

# What the cluster that is driven has.
MODEL = "fake-model"
# Where a body is a task, or holds one.
TASKS = ("/v2/tasks", "/v2/placement/explain")
INFER = re.compile(r"^/v2/pools/.+/infer$")

# Where a body is in the language of another API.
OTHER_APIS = ("/v1/", "/tokenize", "/detokenize", "/apply-template")

# The refusals of TaskRequest::check and Wishes::check that are between fields. Whatever else is
# refused although the document allows it is a hole in the document.
BETWEEN_FIELDS = (
    "prompt and messages: ",
    "prompt or messages: ",
    "inputs: must be those of the workload",
    "inputs: a completion has ",
    "inputs: required by ",
    "placement.mode: ",
    "placement.node_id: ",
    "placement.pin_pool_id: ",
    "placement.spread_by: ",
    "digest: the entry of ",
)
ENDINGS = (
    ": only of a completion",
    # Link-local, metadata: what an address means, not how it is written.
    " is no address of a node",
    " is not among ORCHESTRATORD_NODE_ADDRESSES",
)


@schemathesis.hook
def map_body(context, body):
    """Makes requests that get further. None of this makes a forbidden body an allowed one."""
    # JSON Schema calls 140.0 an integer, our parser does not.
    body = whole(body)
    path = context.operation.path
    if not isinstance(body, dict):
        return body
    if path in TASKS:
        towards_an_engine(body)
    elif INFER.match(path) and isinstance(body.get("task"), dict):
        towards_an_engine(body["task"])
    elif path == "/v2/catalog/models" and isinstance(body.get("model_id"), str):
        # A link to the entry takes a per cent sign for the begin of an encoded character.
        body["model_id"] = body["model_id"].replace("%", "_")
    return body


@schemathesis.hook
def map_headers(context, headers):
    """The framing of a request is HTTP's own: what is wrong there is answered below our documents."""
    framing = ("transfer-encoding", "content-length", "connection", "upgrade", "expect", "te", "host")
    if not headers:
        return headers
    return {name: value for name, value in headers.items() if name.lower() not in framing}


def whole(value):
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    if isinstance(value, list):
        return [whole(item) for item in value]
    if isinstance(value, dict):
        return {name: whole(item) for name, item in value.items()}
    return value


def towards_an_engine(task):
    """Half of the tasks are for the model that is there; those without any input get one."""
    model = task.get("model_ref")
    if isinstance(model, str) and re.fullmatch(r"[!-~]{1,255}", model) and len(model) % 2 == 1:
        task["model_ref"] = MODEL
    inputs = ("prompt", "messages", "inputs")
    if task.get("workload", "completion") == "completion" and all(task.get(name) is None for name in inputs):
        task["prompt"] = "once upon a time"


@schemathesis.check
def refusal_is_of_the_whole_task(ctx, response, case):
    """A request that the document allows is refused only for what no schema can say."""
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 400:
        return
    if case.operation.path.startswith(OTHER_APIS):
        # Our document says "any JSON" of them: what is in it is the engine's to know. Whatever else is held
        # of answers is held of theirs too.
        return
    try:
        error = response.json()
    except json.JSONDecodeError:
        return
    code, message = error.get("code"), error.get("message", "")
    known = message.startswith(BETWEEN_FIELDS) or message.endswith(ENDINGS)
    assert code in ("UNSUPPORTED", "CONTEXT_TOO_LONG") or known, (
        f"the document allows what is refused with {code}: {message}"
    )
