"""A pruned model behind transformers' own ways to serve: its OpenAI-compatible server, pipelines and threads."""

from __future__ import annotations

import base64
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from transformers.utils.import_utils import is_serve_available

import foveate
from foveate import glimpse

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples/demo.png"
QUESTIONS = {"Where is the owl?": "bottom left", "Where is the dog?": "top left"}


def hears_ctrl_c():
    """What runs in the background may have been told to ignore it, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def server():
    if not is_serve_available():
        pytest.skip('needs pip install "transformers[serving]"')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["examples/serve_transformers.py", str(glimpse.PATH), "--method", "divprune+csp", "--keep", "0.5"]
    words += ["--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c
    )
    assert process.stdout is not None and "divprune+csp keep=0.5 on port" in process.stdout.readline()
    yield f"http://localhost:{port}/v1"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, "Ctrl-C ends it"


def content(question):
    url = f"data:image/png;base64,{base64.b64encode(DEMO.read_bytes()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]


def test_an_openai_client_is_answered_whole_and_in_a_stream(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server, api_key="none", max_retries=0)
    for question, right in QUESTIONS.items():
        asked = {"model": str(glimpse.PATH), "messages": [{"role": "user", "content": content(question)}]}
        answer = client.chat.completions.create(**asked, max_tokens=16)
        assert answer.choices[0].message.content == right
        parts = client.chat.completions.create(**asked, max_tokens=16, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == right


def test_threads_share_one_pruned_model():
    model, processor = glimpse.load()

    def ask(question):
        turn = {"role": "user", "content": [{"type": "image", "image": Image.open(DEMO)}, *content(question)[1:]]}
        inputs = processor.apply_chat_template(
            [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        said = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    with foveate.prune(model, "divprune", keep=0.5), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, list(QUESTIONS) * 4)) == list(QUESTIONS.values()) * 4


def test_the_example_names_no_other_part_of_the_server_than_it_must():
    text = (ROOT / "examples/serve_transformers.py").read_text()
    assert set(re.findall(r"server\.(\w+)", text)) == {"_model_manager", "_thread", "kill_server"}
