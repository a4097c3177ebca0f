"""What does serving with fewer image tokens bring? Requests a second of vLLM's engine and server, on one CPU thread.

make installed-vllm && ~/.cache/foveate/venv-vllm/bin/python benchmarks/serving.py

A LLaVA of random weights: a language model of 142 million parameters behind a small CLIP, 576 image tokens,
`--at-once` pictures at a time, no two alike, no caches. float32, as processors without bfloat16 imitate it slowly.
`keep` alternates from batch to batch in one engine; what is compared runs in turn.

engine: `LLM.generate`. text: the same engine given prompts of as many words, no picture. ideal: that, and the
encoder's time in the engine without choosing; of_ideal: how near the engine comes. server: the OpenAI server. stock: a
vLLM without foveate; beside stock: keep 1.0 in the same turns. choosing: what a request spends on it, of its time.
CPU seconds are of the process and its children: other work on the machine adds to the clock, hardly to them.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/served"))  # the engine and the model of the tests

import numpy as np  # noqa: E402
import torch  # noqa: E402
from asking import engine, picture  # noqa: E402
from checkpoints import llava_of, write  # noqa: E402
from PIL import Image  # noqa: E402

from foveate.evaluation.results import Results, run_script  # noqa: E402
from foveate.evaluation.tables import markdown  # noqa: E402
from foveate.vllm import metrics  # noqa: E402

QUESTION = "USER: <image>\nWhat is in this picture? ASSISTANT:"
SEEDS = iter(range(1, 10**9))
ENGINE: dict[str, Any] = dict(
    max_model_len=2048,
    max_num_seqs=8,
    max_num_batched_tokens=4096,
    limit_mm_per_prompt={"image": 1},
    enable_prefix_caching=False,
    mm_processor_cache_gb=0,
)
FOVEATE = {"method": "fopru", "keep": 0.25, "highest": 1.0}


class Timed(NamedTuple):
    """Of a batch: seconds by the clock and of the CPU, and the tokens of one prompt."""

    seconds: float
    cpu_seconds: float
    prompt_tokens: int


VISION: dict[str, Any] = dict(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=336, patch_size=14,
    projection_dim=64,
)  # fmt: skip
LLM: dict[str, Any] = dict(
    vocab_size=320, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    tie_word_embeddings=False,
)  # fmt: skip


def made() -> tuple[Any, Any]:
    """The model, half as large on the disk, and its processor."""
    model, processor = llava_of(VISION, LLM)
    return model.to(torch.bfloat16), processor


def new_picture() -> Image.Image:
    """One that was not there before."""
    return picture(next(SEEDS), (336, 336))


def pictures(count: int, keep: float | None) -> list[dict[str, Any]]:
    """Requests with a picture each."""
    asked = {} if keep is None else {"mm_processor_kwargs": {"foveate": {"keep": keep}}}
    return [{"prompt": QUESTION, "multi_modal_data": {"image": new_picture()}, **asked} for _ in range(count)]


def texts(count: int, length: int) -> list[dict[str, Any]]:
    """Requests of so many words."""
    rng = np.random.default_rng(next(SEEDS))
    return [{"prompt_token_ids": rng.integers(10, 250, length).tolist()} for _ in range(count)]


def answered(llm: Any, requests: list[dict[str, Any]], tokens: int) -> Timed:
    """How long they took, and how long their prompts were."""
    from vllm import SamplingParams

    clock, cpu = time.perf_counter(), time.process_time()
    out = llm.generate(requests, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
    return Timed(time.perf_counter() - clock, time.process_time() - cpu, len(out[0].prompt_token_ids))


def in_turn(runs: dict[str, Callable[[], Timed]], repeat: int) -> dict[str, Timed]:
    """The medians of each; the first turn warms up."""
    taken: dict[str, list[Timed]] = {name: [] for name in runs}
    for turn in range(repeat + 1):
        for name in runs if turn % 2 else reversed(runs):
            one = runs[name]()
            taken[name] += [one] if turn else []
            print(f"{name}: {one[0]:.1f} s, {one[1]:.1f} s of the CPU", file=sys.stderr, flush=True)
    median = statistics.median
    return {
        name: Timed(median(t.seconds for t in each), median(t.cpu_seconds for t in each), each[0].prompt_tokens)
        for name, each in taken.items()
    }


class Server:
    """`vllm serve` with foveate, on this machine only."""

    def __init__(self, path: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "model"]
        options += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
        options += ["--max-num-batched-tokens", "4096", "--limit-mm-per-prompt", '{"image": 1}']
        options += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", "--trust-request-mm-kwargs"]
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(path), *options]
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        overrides = ["--hf-overrides", json.dumps({"foveate": FOVEATE})]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*command, *overrides], env=env, **quiet)

    def __enter__(self) -> Server:
        for _ in range(1200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
                return self
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.5)
        raise TimeoutError("the server does not answer")

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def cpu(self) -> float:
        """Seconds of the server's processes so far."""
        import psutil

        own = psutil.Process(self.process.pid)
        return sum(sum(each.cpu_times()[:2]) for each in [own, *own.children(recursive=True)])

    def ask(self, keep: float, tokens: int) -> int:
        """The tokens of the prompt."""
        data = io.BytesIO()
        new_picture().save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "What is in this picture?"},
        ]
        body = {"model": "model", "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
        body |= {"messages": [{"role": "user", "content": content}], "mm_processor_kwargs": {"foveate": {"keep": keep}}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return int(json.load(answer)["usage"]["prompt_tokens"])

    def batch(self, keep: float, count: int, tokens: int) -> Timed:
        """So many requests at once."""
        clock, cpu = time.perf_counter(), self.cpu()
        with ThreadPoolExecutor(count) as pool:
            prompts = list(pool.map(lambda _: self.ask(keep, tokens), range(count)))
        return Timed(time.perf_counter() - clock, self.cpu() - cpu, prompts[0])


class Encoder:
    """How long a model's encoder takes, choosing included, from now on."""

    def __init__(self, model: Any) -> None:
        self.seconds, self.pictures, self._encode = 0.0, 0, model.embed_multimodal
        model.embed_multimodal = self

    def __call__(self, **inputs: Any) -> Any:
        began = time.process_time()
        found = self._encode(**inputs)
        self.seconds, self.pictures = self.seconds + time.process_time() - began, self.pictures + len(found)
        return found


KEEPS = (1.0, 0.25)


def measure(results: Results, options: argparse.Namespace) -> None:
    """Adds the rows that are missing."""
    path, count = write(made, options.checkpoint), options.at_once

    def add(run: str, keep: float, taken: Timed, whole: Timed | None = None, **more: float) -> None:
        """whole: what the run is compared with."""
        row = {"run": run, "keep": keep, **taken._asdict(), "requests_per_s": count / taken.seconds}
        if whole is not None:
            row |= {"speedup": whole.seconds / taken.seconds, "cpu_speedup": whole.cpu_seconds / taken.cpu_seconds}
        results.add({**row, **more, "load": os.getloadavg()[0]})

    def of_pictures(llm: Any, keep: float | None) -> Callable[[], Timed]:
        return lambda: answered(llm, pictures(count, keep), options.tokens)

    if not results.find(run="engine", keep=0.25):
        metrics.SECONDS = float("inf")  # the times of choosing are summed up over all batches
        with engine(path, FOVEATE, **ENGINE) as llm:
            runs = {f"engine {keep}": of_pictures(llm, keep) for keep in KEEPS}
            for keep in KEEPS:
                length = answered(llm, pictures(1, keep), 1).prompt_tokens
                runs[f"text {keep}"] = lambda n=length: answered(llm, texts(count, n), options.tokens)  # type: ignore[misc]
            (model,) = llm.apply_model(lambda model: model)
            encoder = Encoder(model)
            taken = in_turn(runs, options.repeat)
            choosing = model._choosing.seconds / model._choosing.pictures
            encoding = encoder.seconds / encoder.pictures - choosing
        (whole, own), (text, less) = ([taken[f"{run} {keep}"] for keep in KEEPS] for run in ("engine", "text"))
        seconds = count * encoding
        ideal = Timed(less.seconds + seconds, less.cpu_seconds + seconds, own.prompt_tokens)
        add("engine", 1.0, whole)
        share = {"choosing_share": choosing / (own.cpu_seconds / count)}
        of_ideal = {"of_ideal": ideal.seconds / own.seconds, "cpu_of_ideal": ideal.cpu_seconds / own.cpu_seconds}
        add("text", 1.0, text)
        add("text", 0.25, less, text)
        add("ideal", 0.25, ideal, whole)
        add("engine", 0.25, own, whole, **of_ideal, **share)
    if not results.find(run="beside stock", keep=1.0):
        with engine(path, FOVEATE, **ENGINE) as pruned, engine(path, **ENGINE) as stock:
            runs = {"pruned": of_pictures(pruned, 1.0), "stock": of_pictures(stock, None)}
            taken = in_turn(runs, 2 * options.repeat)
        add("stock", 1.0, taken["stock"])
        add("beside stock", 1.0, taken["pruned"], taken["stock"])
    if not results.find(run="server", keep=0.25):
        with Server(path) as server:
            runs = {f"{keep}": lambda keep=keep: server.batch(keep, count, 2 * options.tokens) for keep in KEEPS}  # type: ignore[misc]
            taken = in_turn(runs, options.repeat)
        add("server", 1.0, taken["1.0"])
        add("server", 0.25, taken["0.25"], taken["1.0"])


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=4, help="requests of a batch")
    parser.add_argument("--tokens", type=int, default=4, help="of an answer; the server's have twice as many")
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--checkpoint", type=Path, default=Path("results/serving-model"), help="where the model is put")
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    settings = {"at_once": options.at_once, "tokens": options.tokens, "repeat": options.repeat}
    settings |= {"model": "llava 142M, random", "device": "cpu", "dtype": "float32", "threads": 1, **FOVEATE}
    settings["vllm"] = version("vllm")
    with Results(options.out, "serving", settings, keys=("run", "keep")) as results:
        measure(results, options)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
