"""LangChain over OpenAI's client."""

import os

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

import httpx2

from cases import KEY, MODEL, ROOT, V1, case, run

EMBEDDINGS_MODEL = os.environ["CLUSTER_EMBEDDINGS_MODEL"]
HELLO = [HumanMessage("hello there")]

chat = ChatOpenAI(base_url=V1, api_key=KEY, model=MODEL, temperature=0, max_tokens=6, max_retries=0)


class Weather(BaseModel):
    """What it is like."""

    sunny: bool


@case
def invoke():
    answer = chat.invoke(HELLO)
    assert answer.content and answer.usage_metadata["output_tokens"] == 6, answer


@case
def stream():
    pieces = list(chat.stream(HELLO))
    assert "".join(piece.content for piece in pieces) == chat.invoke(HELLO).content, pieces


@case
async def asynchronous():
    pieces = [piece.content async for piece in chat.astream(HELLO)]
    assert "".join(pieces) == (await chat.ainvoke(HELLO)).content, pieces


@case
def batch():
    answers = chat.batch([HELLO] * 4)
    assert len({answer.content for answer in answers}) == 1, answers


@case
def tools():
    headers = {"authorization": f"Bearer {KEY}"}
    mark = httpx2.post(f"{ROOT}/tokenize", headers=headers, json={"model": MODEL, "content": "<|turn|>", "parse_special": True})
    bias = {str(mark.json()["tokens"][-1]): 100}
    bound = chat.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False).bind(logit_bias=bias, max_tokens=200)
    (call,) = bound.invoke(HELLO).tool_calls
    assert call["name"] == "Weather" and isinstance(call["args"]["sunny"], bool), call


@case
def structured_output():
    roomy = ChatOpenAI(base_url=V1, api_key=KEY, model=MODEL, temperature=0, max_tokens=200)
    assert isinstance(roomy.with_structured_output(Weather, method="json_schema").invoke(HELLO), Weather)


@case
def logprobs():
    tokens = chat.bind(logprobs=True, top_logprobs=1).invoke(HELLO).response_metadata["logprobs"]["content"]
    assert len(tokens) == 6, tokens


@case
def embeddings():
    # Its own counting of tokens needs a file of OpenAI's hosts.
    of = OpenAIEmbeddings(base_url=V1, api_key=KEY, model=EMBEDDINGS_MODEL, check_embedding_ctx_length=False)
    assert [len(vector) for vector in of.embed_documents(["a", "the sea"])] == [64, 64]
    assert len(of.embed_query("a")) == 64


run()
