"""A real server, started as a user does, asked through the OpenAI client."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import picture
from checkpoints import make

FOVEATE = [sys.executable, "-m", "foveate", "serve"]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of `foveate serve`, with LLaVA and fopru, as it is started in docs/serving.md."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    checkpoint = make("llava", folder / "llava")
    command = [*FOVEATE, str(checkpoint), "--method", "fopru", "--keep", "0.25", "--lowest", "0.1", "--highest", "1.0"]
    vllm = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", "--dtype", "float32"]
    vllm += ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4", "--enable-prompt-tokens-details"]
    vllm += ["--block-size", "32"]  # prompts are shorter than a block of CPUs is by itself
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = (folder / "server.log").open("w+")
    process = subprocess.Popen([*command, "--", *vllm], stdout=log, stderr=subprocess.STDOUT, env=env)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(2400):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            if process.poll() is not None:
                log.seek(0)
                pytest.fail(f"the server ended:\n{log.read()[-4000:]}")
            time.sleep(0.5)
        else:
            pytest.fail("the server did not answer in 20 minutes")
        log.seek(0)
        assert "64 -> 16" in log.read()  # said before the start
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # it does not listen while it starts
            process.kill()
        log.close()


@pytest.fixture(scope="module")
def client(server: str) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def ask(client: Any, seed: int, keep: Any = None) -> Any:
    data = io.BytesIO()
    picture(seed).save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is in this picture?"}]
    asked = {} if keep is None else {"mm_processor_kwargs": {"foveate": {"keep": keep}}}
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=8,
        extra_body={"ignore_eos": True, **asked},
    )


def test_prompts_have_fewer_tokens(client: Any) -> None:
    own, half, whole = (ask(client, 1, keep).usage.prompt_tokens for keep in (None, 0.5, 1.0))
    assert (half - own, whole - own) == (16, 48)
    assert ask(client, 1, 32).usage.prompt_tokens == half


def test_the_same_again_comes_from_the_cache(client: Any) -> None:
    first, again = ask(client, 2), ask(client, 2)
    assert again.choices[0].message.content == first.choices[0].message.content
    assert not (first.usage.prompt_tokens_details and first.usage.prompt_tokens_details.cached_tokens)
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    # Another keep is another picture.
    other = ask(client, 2, 0.5)
    assert other.usage.prompt_tokens == first.usage.prompt_tokens + 16


@pytest.mark.parametrize(
    ("keep", "says"), [(-1, "keep must be"), ("x", "keep must be"), (0.01, "outside"), ({"a": 1}, "keep must be")]
)
def test_bad_values_are_the_client_s_mistake(client: Any, keep: Any, says: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match=says):
        ask(client, 3, keep)
    ask(client, 3)  # and the next request is answered


def test_metrics(client: Any, server: str) -> None:
    def counted() -> dict[str, float]:
        text = urllib.request.urlopen(f"{server}/metrics").read().decode()
        return {stage: float(n) for stage, n in re.findall(r'foveate:image_tokens_total\{stage="(\w+)"\} (\S+)', text)}

    ask(client, 4)
    before = counted()
    ask(client, 5, 0.5)
    after = counted()
    assert (after["before"] - before["before"], after["after"] - before["after"]) == (64, 32)


def test_what_cannot_be_served_is_said_in_one_line(folder: Path) -> None:
    checkpoint = make("llava", folder / "llava")
    for more, says in ((["--method", "plphp"], "transformers"), (["--lowest", "0.9"], "lowest")):
        said = subprocess.run([*FOVEATE, str(checkpoint), *more], capture_output=True, text=True)
        assert said.returncode == 2 and says in said.stderr and said.stderr.count("\n") == 1
