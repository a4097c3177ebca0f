"""Tests run offline, on one thread (xdist brings its own workers), and upstream deprecations are errors."""

import os
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)

GOLDEN = (5**0.5 - 1) / 2

# transformers 5.19 calls a layer of its own by a name that it has deprecated; nobody else can mend that.
THEIRS = "ignore:`hidden_state` is deprecated .* `MllamaVisionEncoderLayer.forward`:FutureWarning"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rarer", type=float, default=1, help="sample rows of tests so many times more rarely")


def pytest_configure(config: pytest.Config) -> None:
    for category in ("FutureWarning", "DeprecationWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}")
    config.addinivalue_line("filterwarnings", THEIRS)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations without plots, which take longer than a few answers; tests that look at plots do without this."""
    monkeypatch.setattr("foveate.evaluation.evaluate._draw", lambda *args: None)


@pytest.hookimpl(tryfirst=True)  # before slow ones are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests whose rows are `sampled(n)` about every n-th row is a quick one, and the others are slow."""
    rows: Counter[tuple[str, str]] = Counter()
    rarer = config.getoption("--rarer")
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is not None and item.get_closest_marker("slow") is None:
            test = str(item.path), getattr(item, "originalname", item.name)
            # Steps of the golden ratio: every n-th row would be of the same method in every family.
            if rows[test] * GOLDEN % 1 * marker.args[0] * rarer >= 1:
                item.add_marker(pytest.mark.slow)
            rows[test] += 1
