"""Loads what a command names: the device, a model with its processor, and the guide of methods that have one."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.asking.mistake import Mistake, one_line
from foveate.errors import KeepsOneToken

if TYPE_CHECKING:
    from foveate.methods.base import Method

GLIMPSE = "glimpse"
GLIMPSE_CROSS = "glimpse-cross"
GLIMPSE_VIDEO = "glimpse-video"
BUILT_IN = (GLIMPSE, GLIMPSE_CROSS, GLIMPSE_VIDEO)  # models that foveate brings
DTYPES = ("float32", "bfloat16", "float16")
KERNELS = ("sdpa", "eager")  # of attention, beside flash attention


def hush() -> None:
    """Silence what upstream libraries print while all is well; downloads still show their progress."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    warnings.simplefilter("once", KeepsOneToken)
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()


def read_config(model: str, option: str = "--model") -> Any:
    """The configuration of a model folder or hub id, without its weights. option: which took it."""
    from transformers import AutoConfig

    folder = Path(model)
    if folder.is_file():
        raise Mistake(f"{model} is a file: {option} takes a model folder or a hub id")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise Mistake(f"{model} is no model folder: it has no config.json")
    if not folder.exists() and (model.count("/") > 1 or model.startswith((".", "/", "~"))):
        raise Mistake(f"no such model folder: {model} ({option} takes a folder or a hub id such as owner/name)")
    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:
        where = "read" if folder.exists() else "find, here or on the hub,"
        raise Mistake(f"cannot {where} the model {model}: {one_line(error)}") from error


def check_dtype(dtype: str, attn: str | None = None) -> None:
    """Refuse what `--dtype` does not know, and `--attn`."""
    if dtype not in ("auto", *DTYPES):
        raise Mistake(f"--dtype {dtype} is unknown: use auto, {', '.join(DTYPES)}")
    if attn is not None and attn not in KERNELS and not attn.startswith("flash_attention"):
        raise Mistake(f"--attn {attn} is unknown: use {', '.join(KERNELS)} or flash_attention_2")


def dtype_name(dtype: str, config: Any) -> str:
    """What `auto` will become, as far as the configuration says."""
    own = getattr(config, "dtype", None)
    return str(own).removeprefix("torch.") if dtype == "auto" and own is not None else dtype


def built_in(model: str, dtype: str) -> tuple[str, str]:
    """The folder of a model that foveate brings, and the dtype that suits it; others as they are."""
    if model not in BUILT_IN:
        return model, dtype
    import torch

    from foveate import glimpse

    # So small a model is fastest on one thread: more of them wait for each other longer than they compute.
    torch.set_num_threads(1)
    # bf16, in which its weights are stored, is slow on many CPUs.
    folders = {GLIMPSE: glimpse.PATH, GLIMPSE_CROSS: glimpse.CROSS_PATH, GLIMPSE_VIDEO: glimpse.VIDEO_PATH}
    return str(folders[model]), "float32" if dtype == "auto" else dtype


def resolve_device(name: str) -> str:
    """The device to run on; `auto` prefers CUDA."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).item()  # "meta" has no numbers
    except Exception as error:  # torch raises many types here
        raise Mistake(f"no device {name!r} here: try --device cpu") from error
    return name


def load(model: str, config: Any, *, device: str, dtype: str, attn: str | None) -> tuple[Any, Any]:
    """The model, ready to generate, and its processor."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model)
    except Exception as error:
        raise Mistake(f"cannot load the model {model}: {one_line(error)}") from error
    if not getattr(processor, "chat_template", None):
        raise Mistake(f"{model} has no chat template, so it cannot be asked: choose an instruction-tuned model")
    return _load_weights(model, config, device=device, dtype=dtype, attn=attn), processor


def _load_weights(model: str, config: Any, *, device: str, dtype: str, attn: str | None) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        loading: Any = AutoModelForImageTextToText.from_pretrained(
            model, config=config, dtype=dtype, attn_implementation=attn, output_loading_info=True
        )
    except Exception as error:
        raise Mistake(f"cannot load the model {model}: {one_line(error)}") from error
    loaded, info = loading
    if missing := sorted(info["missing_keys"]):
        # transformers would go on with random weights.
        raise Mistake(f"the weights of {model} are incomplete: {len(missing)} are missing, e.g. {missing[0]}")
    return loaded.to(device).eval()


def load_guide(
    methods: Iterable[Method], guide: str | None, source: str, config: Any, *, device: str, dtype: str
) -> None:
    """Load the guide, and put it where `methods` have its name.

    guide: what --guide says; None, or its name, for glimpse's own. source, config: of the model.
    """
    from foveate.methods.base import GuidedMethod

    guided = [method for method in methods if isinstance(method, GuidedMethod)]
    if not guided and guide is not None:
        raise Mistake(f"--guide {guide}: none of the methods takes a guide; leave it out, or ask for sgl")
    if not guided:
        return
    small: Any
    if guide in (None, GLIMPSE):
        from foveate import glimpse

        if source != str(glimpse.PATH):
            raise Mistake(f"--guide {GLIMPSE} goes with --model {GLIMPSE} only")

        small = glimpse.load("small", dtype=dtype)[0].to(device)
    else:
        own = read_config(guide, "--guide")
        if own.model_type != config.model_type:
            raise Mistake(
                f"--guide {guide} is a {own.model_type} model and the model is not: give one of {config.model_type}"
            )
        _check_tokenizer(guide, source)
        small = _load_weights(guide, own, device=device, dtype=dtype, attn=None)
    for method in guided:
        method.guide = small


def _check_tokenizer(guide: str, model: str) -> None:
    """A guide that reads other words would choose tokens for another question, and nobody would see it."""
    from transformers import AutoTokenizer

    try:
        theirs, ours = (AutoTokenizer.from_pretrained(name).get_vocab() for name in (guide, model))
    except Exception as error:
        raise Mistake(f"cannot compare the tokenizers of --guide {guide} and the model: {one_line(error)}") from error
    if not ours.items() <= theirs.items():
        raise Mistake(f"--guide {guide} has another tokenizer than the model: both must read the same tokens")
