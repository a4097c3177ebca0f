"""Tests run offline, on one thread (xdist brings its own workers), and upstream deprecations are errors."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)

# transformers 5.19 calls a layer of its own by a name that it has deprecated; nobody else can mend that.
THEIRS = "ignore:`hidden_state` is deprecated .* `MllamaVisionEncoderLayer.forward`:FutureWarning"


def pytest_configure(config: pytest.Config) -> None:
    for category in ("FutureWarning", "DeprecationWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}")
    config.addinivalue_line("filterwarnings", THEIRS)
