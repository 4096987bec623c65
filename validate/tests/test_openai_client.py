"""A policy of the user's own in vLLM's OpenAI server, seen from the ``openai`` client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")
openai = pytest.importorskip("openai", reason="the OpenAI client comes with vLLM")

from validate import tiny_model  # noqa: E402
from validate.tests.server import ServerError, vllm_server  # noqa: E402

POLICY = """
from dataclasses import dataclass
from policies.api import ADMIT, Admission, AdmissionPolicy, EngineView, Reject, RequestView
from policies.registry import register

@register("admission/test_doorman")
@dataclass
class Doorman(AdmissionPolicy):
    limit_tokens: int = 1000

    def admit(self, request: RequestView, engine: EngineView, now: float) -> Admission:
        if request.tenant == "stranger":
            return Reject("strangers are not served")
        if request.prompt_tokens > self.limit_tokens:
            return Reject(f"{request.prompt_tokens} tokens are more than {self.limit_tokens}")
        return ADMIT
"""
OPTIONS = [
    *("--load-format", "dummy", "--enforce-eager", "--max-model-len", "1024"),
    *("--block-size", "32", "--num-gpu-blocks-override", "128"),
    *("--served-model-name", "tiny"),
    *("--scheduler-cls", "validate.vllm_plugin.PolicyScheduler"),
    *("--middleware", "validate.vllm_plugin.rejections.Rejections"),
]


def options(modules: Path, admission: str) -> list[str]:
    ours = {
        "admission": {"name": admission, "limit_tokens": 100},
        "policy_modules": [str(modules)],
    }
    return [*OPTIONS, "--additional-config", json.dumps({"servelab": ours})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    tiny_model.write(folder / "model")
    (folder / "doorman_for_test.py").write_text(POLICY)
    return folder


@pytest.fixture(scope="module")
def misspelt(folder: Path) -> Iterator[Future[str]]:
    """What a server prints whose policy does not exist; it starts beside the good one."""

    def start() -> str:
        given = options(folder / "doorman_for_test.py", "test_dorman")
        log = folder / "misspelt.log"
        with (
            pytest.raises(ServerError, match="ended with code"),
            vllm_server(folder / "model", given, log=log),
        ):
            pass
        return log.read_text()

    with ThreadPoolExecutor() as pool:
        yield pool.submit(start)


@pytest.fixture(scope="module")
def url(folder: Path, misspelt: Future[str]) -> Iterator[str]:
    given = options(folder / "doorman_for_test.py", "test_doorman")
    with vllm_server(folder / "model", given, log=folder / "log") as url:
        yield url


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Any]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as made:
        yield made


def prompt(first: int, tokens: int) -> list[int]:
    return [10 + (first + i) % 500 for i in range(tokens)]


async def streamed(made: Any, tokens: list[int], **more: Any) -> list[str]:
    chunks = await made.completions.create(
        model="tiny", prompt=tokens, max_tokens=8, stream=True, extra_body=more
    )
    return [chunk.choices[0].text async for chunk in chunks if chunk.choices]


def test_streams_run_side_by_side_and_rejections_are_errors(url: str) -> None:
    async def run() -> list[Any]:
        async with client(url) as made:
            return await asyncio.gather(
                *(streamed(made, prompt(i, 40 + i), ignore_eos=True) for i in range(4)),
                streamed(made, prompt(0, 150)),
                streamed(made, prompt(0, 20), vllm_xargs={"tenant": "stranger"}),
                return_exceptions=True,
            )

    *answers, large, stranger = asyncio.run(run())
    for answer in answers:
        assert len("".join(answer).split()) == 8
        assert len(answer) > 1
    for error, reason in [
        (large, "150 tokens are more than 100"),
        (stranger, "strangers are not served"),
    ]:
        assert isinstance(error, openai.RateLimitError)
        assert error.status_code == 429
        assert error.body == {
            "message": reason,
            "type": "rejected_by_policy",
            "param": None,
            "code": 429,
        }
        assert error.response.request.headers["x-stainless-retry-count"] == "0"


def test_chats_and_whole_answers_too(url: str) -> None:
    async def run() -> list[Any]:
        async with client(url) as made:
            chat = made.chat.completions.create
            long = [{"role": "user", "content": " ".join(f"t{i}" for i in range(150))}]
            short = [{"role": "user", "content": "t1 t2"}]
            ask = {"model": "tiny", "max_tokens": 3}
            complete = made.completions.create
            return await asyncio.gather(
                chat(messages=long, stream=True, **ask),
                chat(messages=long, **ask),
                complete(prompt=prompt(0, 150), n=2, temperature=1.0, **ask),
                complete(prompt=prompt(0, 150), stream=True, n=2, temperature=1.0, **ask),
                chat(messages=short, extra_body={"ignore_eos": True}, **ask),
                complete(prompt=[prompt(0, 150), prompt(0, 9)], **ask),
                complete(prompt=prompt(0, 2000), **ask),
                return_exceptions=True,
            )

    *refused, good, mixed, wrong = asyncio.run(run())
    assert [type(error) for error in refused] == [openai.RateLimitError] * 4
    assert good.usage.completion_tokens == 3
    assert mixed.choices[0].finish_reason == "abort"
    assert mixed.choices[1].finish_reason in {"stop", "length"}
    assert isinstance(wrong, openai.BadRequestError), "vLLM's own errors stay"


def test_a_wrong_name_stops_the_server_with_one_line(misspelt: Future[str]) -> None:
    lines = [line for line in misspelt.result().splitlines() if "test_dorman" in line]
    assert any("did you mean 'admission/test_doorman'" in line for line in lines), lines
