"""What the official clients do, against the server: the Python one, and (where node is) Node's."""

from __future__ import annotations

import base64
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from helpers_server import Server, start_server, stop_server
from openai import AsyncOpenAI, OpenAI

from fastdeploy import LLM

HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]
FLOWS = Path(__file__).parents[1] / "node" / "flows.mjs"


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none", max_retries=0)


def test_chat_with_samples_and_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=HELLO, n=3, max_tokens=6, seed=1, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    counts = [len(choice.logprobs.content) for choice in answer.choices]
    assert sum(counts) == answer.usage.completion_tokens
    assert all(len(t.top_logprobs) == 2 for c in answer.choices for t in c.logprobs.content)


def test_all_stream_options_of_the_client_are_taken(client: OpenAI) -> None:
    options: Any = {"include_usage": True, "include_obfuscation": False}
    fields: dict[str, Any] = {"model": "m", "max_tokens": 2, "stream": True}
    fields["stream_options"] = options
    for stream in (
        client.chat.completions.create(messages=HELLO, **fields),
        client.completions.create(prompt="Hello", **fields),
    ):
        assert list(stream)[-1].usage is not None


def test_the_stream_helper_puts_the_answer_together(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": "m", "messages": HELLO, "max_tokens": 9, "temperature": 0}
    text = client.chat.completions.create(**settings).choices[0].message.content
    settings["stop"] = text[3:5]  # the helper takes an end by length for a failure
    whole = client.chat.completions.create(**settings).choices[0]
    with client.chat.completions.stream(**settings) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert (final.message.content, final.finish_reason) == (
        whole.message.content,
        whole.finish_reason,
    )


def test_embeddings_are_those_of_the_library(client: OpenAI, llm: LLM) -> None:
    texts = ["Hello", "The dog sleeps"]
    expected = llm.embed(texts)
    got = client.embeddings.create(model="m", input=texts)  # the client asks for base64
    for one, vector in zip(got.data, expected):
        assert one.embedding == pytest.approx(vector, abs=1e-6)
    ids = [llm.tokenizer.encode(text) for text in texts]
    floats: dict[str, Any] = {"model": "m", "encoding_format": "float"}
    by_ids = client.embeddings.create(input=ids, **floats)
    for one, vector in zip(by_ids.data, expected):
        assert one.embedding == pytest.approx(vector, abs=1e-6)
    assert got.usage.prompt_tokens == sum(map(len, ids))
    one = client.embeddings.create(input=ids[0], dimensions=3, **floats).data
    assert len(one) == 1 and len(one[0].embedding) == 3
    with pytest.raises(openai.BadRequestError, match="vectors have"):
        client.embeddings.create(model="m", input="x", dimensions=10_000)


def test_embeddings_of_chats_and_of_long_texts(server: Server, llm: LLM) -> None:
    url = server.url + "/embeddings"
    body: dict[str, Any] = {"messages": HELLO, "normalize": False, "pooling": "last"}
    vector = httpx.post(url, json=body).json()["data"][0]["embedding"]
    chat = llm.template.encode(llm.tokenizer, HELLO, add_generation_prompt=False).token_ids
    (expected,) = llm.embed(chat, normalize=False, pooling="last")
    assert vector == pytest.approx(expected, abs=1e-5)
    packed = httpx.post(url, json=body | {"encoding_format": "base64"}).json()["data"][0]
    data = base64.b64decode(packed["embedding"])
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == pytest.approx(vector, abs=1e-5)
    ids = list(range(5, 40)) * 10
    refused = httpx.post(url, json={"input": ids})
    assert refused.status_code == 400 and "max_model_len" in refused.text
    for count, kept in ((-1, ids[-255:]), (20, ids[-20:])):
        body = {"input": ids, "truncate_prompt_tokens": count}
        answer = httpx.post(url, json=body).json()
        assert answer["usage"]["prompt_tokens"] == len(kept)
        (expected,) = llm.embed(kept)
        assert answer["data"][0]["embedding"] == pytest.approx(expected, abs=1e-5)


def test_rerank_and_score_are_cosines(server: Server, llm: LLM) -> None:
    query, texts = "The dog", ["Hello", "The dog", "The dog sleeps"]
    vectors = llm.embed([query, *texts])
    expected = [sum(a * b for a, b in zip(vectors[0], vector)) for vector in vectors[1:]]
    body: dict[str, Any] = {"query": query, "documents": texts, "top_n": 2}
    results = httpx.post(server.url + "/rerank", json=body).json()["results"]
    assert results[0]["index"] == 1 and len(results) == 2
    assert results[0]["document"] == {"text": "The dog"}
    assert results[0]["relevance_score"] == pytest.approx(1)
    body = {"text_1": query, "text_2": texts}
    scores = httpx.post(server.url + "/score", json=body).json()["data"]
    assert [one["score"] for one in scores] == pytest.approx(expected, abs=1e-5)
    refused = httpx.post(server.url + "/score", json=body | {"text_1": texts[:2]})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "text_1"


def test_tokenize_agrees_with_what_is_served(server: Server, llm: LLM, client: OpenAI) -> None:
    def post(path: str, **body: Any) -> Any:
        return httpx.post(server.url + path, json=body).json()

    text = "The quick brown <|end_of_sentence|> fox"
    got = post("/tokenize", prompt=text, return_token_strs=True)
    assert got["tokens"] == llm.tokenizer.encode(text) and "".join(got["token_strs"]) == text
    assert got["count"] == len(got["tokens"]) and got["max_model_len"] == 256
    assert post("/detokenize", tokens=got["tokens"]) == {"prompt": text}
    begun = post("/tokenize", prompt=text, add_special_tokens=True)["tokens"]
    assert begun == [llm.tokenizer.bos_id, *got["tokens"]]
    chat = post("/tokenize", messages=HELLO)["tokens"]
    answer = client.chat.completions.create(model="m", messages=HELLO, max_tokens=1)
    assert len(chat) == answer.usage.prompt_tokens
    rendered = post("/chat/completions/render", messages=HELLO)
    assert rendered["tokens"] == chat and rendered["prompt"] == llm.tokenizer.decode(chat)
    assert "error" in post("/tokenize", prompt="x", messages=HELLO)
    assert "ids end at" in post("/detokenize", tokens=[10**6])["error"]["message"]


def test_models_and_what_the_server_says_of_itself(server: Server, client: OpenAI) -> None:
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    root = server.url.removesuffix("/v1")
    assert httpx.get(root + "/version").json()["version"].count(".") == 2
    settings = httpx.get(root + "/config-info").json()
    assert (settings["max_model_len"], settings["model"], settings["api_key"]) == (256, "tiny", 0)
    load = httpx.get(root + "/load").json()
    assert load["server_load"] == load["num_requests_running"] == load["num_requests_waiting"] == 0


def test_a_request_is_ended_by_its_id(server: Server) -> None:
    body = {"prompt": "Hello", "max_tokens": 240, "n": 50, "ignore_eos": True, "stream": True}
    body["request_id"] = "to-be-ended"
    with httpx.stream("POST", server.url + "/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        ended = httpx.post(
            server.url + "/abort_requests", json={"request_ids": ["cmpl-to-be-ended"]}
        )
        assert ended.json() == {"aborted": ["cmpl-to-be-ended"]}
        rest = list(lines)
    ends = [sum(f'"finish_reason":"{end}"' in line for line in rest) for end in ("abort", "length")]
    # On a busy machine the first ones are done before the others are ended.
    assert ends[0] > 0 and sum(ends) == 50, f"{ends}"
    assert [line for line in rest if line][-1] == "data: [DONE]"
    again = httpx.post(server.url + "/abort_requests", json={"request_ids": ["cmpl-to-be-ended"]})
    assert again.status_code == 404
    assert httpx.post(server.url + "/abort_requests", json={"abort_all": True}).json() == {
        "aborted": []
    }


async def _several(url: str) -> list[str]:
    import asyncio

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        calls = [
            client.responses.create(model="m", input=f"Say {i}", max_output_tokens=4)
            for i in range(6)
        ]
        return [response.status for response in await asyncio.gather(*calls)]


def test_the_asynchronous_client(server: Server) -> None:
    import asyncio

    assert set(asyncio.run(_several(server.url))) <= {"completed", "incomplete"}


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the npm package `openai`: OPENAI_NODE_FOLDER, or one installed now."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    given = os.environ.get("OPENAI_NODE_FOLDER")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", "openai@7"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        pytest.skip("npm could not fetch the package openai within 90 s")
    if done.returncode:
        pytest.skip(f"npm could not fetch the package openai: {done.stderr.strip()[-200:]}")
    return folder


def test_the_node_client(folder: Path, node_modules: Path) -> None:
    pytest.importorskip("llguidance")
    script = node_modules / "flows.mjs"  # modules are looked for beside the script
    script.write_text(FLOWS.read_text(encoding="utf-8"), encoding="utf-8")
    template = node_modules / "template.jinja"  # the model's own has no place for tools
    template.write_text(
        "{{ tools | tojson }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    flags = ("--tool-call-parser", "hermes", "--chat-template", str(template))
    server = start_server(folder, "--enable-logprob", *flags, max_len=512)
    done = subprocess.run(
        ["node", str(script), server.url], capture_output=True, text=True, timeout=120
    )
    assert stop_server(server) == 0
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "11 flows", done.stdout
