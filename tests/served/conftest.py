"""Tests that run vLLM: `make test-vllm` makes the environment that they need; without vLLM there are none of them."""

import importlib.util
import os
from pathlib import Path

import pytest

THERE = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if THERE else ["test_*.py"]

# One process, one thread: the machine of CI has two cores.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_PLUGINS": "foveate",
    "OMP_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
for name, value in SETTINGS.items() if THERE else ():
    os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny checkpoints of this run go."""
    return tmp_path_factory.mktemp("checkpoints")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What vLLM warns about is not ours."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("default"))
