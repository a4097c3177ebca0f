"""`foveate serve`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.asking.loading import built_in, dtype_name, hush, read_config
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.options import DEFAULT, typed
from foveate.asking.subject import config_digest
from foveate.commands.parameters import Keep, Options
from foveate.commands.prepare import parse_options, read_one

if TYPE_CHECKING:
    from foveate.vllm.settings import Settings


def serve(
    model: Annotated[str, typer.Argument(help="A hub id, a model folder, or glimpse (built in).", show_default=False)],
    vllm_options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM OPTIONS]", help="Everything else that `vllm serve` takes.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", "-m", help="One that acts before the LLM.", show_default=f"the saved one, or {DEFAULT}"
        ),
    ] = None,
    keep: Keep = None,
    option: Options = None,
    saved: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "--certificate",
            metavar="PATH",
            help="A foveate_config.json, or what foveate calibrate wrote.",
            show_default="the one in the model's folder",
        ),
    ] = None,
    lowest: Annotated[
        str | None, typer.Option(help="The least keep that requests may ask for.", show_default="keep")
    ] = None,
    highest: Annotated[
        str | None, typer.Option(help="The most keep that requests may ask for.", show_default="keep")
    ] = None,
    positions: Annotated[
        str, typer.Option(help="original: those in the unpruned prompt; compact: closed up.")
    ] = "original",
    other_backend: Annotated[
        bool, typer.Option("--other-backend", help="Take a certificate of transformers' answers, without its promise.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print, start nothing.")] = False,
) -> None:
    """Serve a model with vLLM, with fewer image tokens in every prompt.

    foveate serve llava-hf/llava-1.5-7b-hf --method fopru --keep 0.25 -- --port 8000
    """
    from foveate.vllm.settings import Settings

    model, _ = built_in(model, "auto")
    options = _method(model, method, keep, option or [], saved)
    for name, value in (("lowest", lowest), ("highest", highest)):
        if value is not None:
            options[name] = typed(value)
    if positions != "original":
        options["positions"] = positions
    try:
        settings = Settings.parse(options)
    except ValueError as error:
        raise Mistake(one_line(error)) from error
    if saved is not None:
        _check_promise(saved, options, model, vllm_options or [], other_backend=other_backend)
    command = _command(model, options, settings, vllm_options or [])
    program = None if dry_run else _program()
    _say_saving(model, settings)
    typer.echo(shlex.join(command))
    if program is not None:
        sys.stdout.flush()
        os.execv(program, command)


def _method(
    model: str, name: str | None, keep: str | None, option: Sequence[str], saved: Path | None
) -> dict[str, Any]:
    """The method and its options, from the command line or from what `Method.save_pretrained` wrote."""
    from foveate.methods.method import CONFIG_NAME, read_config

    options = parse_options(keep, option)
    if saved is None and name is None and (Path(model) / CONFIG_NAME).is_file():
        saved = Path(model)
    if saved is None:
        name, options = read_one(name or DEFAULT, options)
        return {"method": name, "keep": 0.25, **options}
    try:
        config = read_config(saved)
    except (OSError, ValueError) as error:
        raise Mistake(f"--config {saved}: {one_line(error)}") from error
    if name is not None:
        name, options = read_one(name, options)
    if name is not None and name != config.get("method"):
        raise Mistake(f"--method {name}, and {saved} is of {config.get('method')}: leave one of them out")
    return {**config, **options}


def _check_promise(
    path: Path, options: dict[str, Any], model: str, more: Sequence[str], *, other_backend: bool
) -> None:
    """Refuse what the certificate in a file, where it is one, is not of. more: what vLLM is told."""
    from foveate.methods.method import read_certificate

    promised = read_certificate(path)
    if promised is None:
        return
    theirs, certified = promised.get("setting") or {}, promised.get("method") or {}
    if other := [name for name in {**certified, **options} if certified.get(name) != options.get(name)]:
        raise Mistake(
            f"the certificate in {path} is of another {', '.join(other)}: leave out --keep, -o, --lowest, --highest "
            "and --positions, or give the method without the certificate"
        )
    config = read_config(model)
    if promised.get("config") != config_digest(config):
        raise Mistake(f"the certificate in {path} is of another model than {model}: run foveate calibrate for this one")
    dtype = _dtype(more, config)
    if dtype != theirs.get("dtype"):
        raise Mistake(
            f"the certificate in {path} is of {theirs.get('dtype')}, and vLLM would run {dtype}: add "
            f"-- --dtype {theirs.get('dtype')}, or calibrate with --dtype {dtype}"
        )
    if theirs.get("backend") != "vllm" and not other_backend:
        raise Mistake(
            f"the certificate in {path} is of answers by {theirs.get('backend')}, and vLLM's kernels round "
            "differently: give --other-backend to serve the same method without the promise, and foveate calibrate "
            "--monitor shadow requests of the server"
        )


def _dtype(more: Sequence[str], config: Any) -> str:
    """What vLLM would run."""
    for at, word in enumerate(more):
        name, equals, value = word.partition("=")
        if name == "--dtype":
            value = value if equals else "".join(more[at + 1 : at + 2])
            return {"half": "float16", "float": "float32"}.get(value, value)
    return dtype_name("auto", config)


def _say_saving(model: str, settings: Settings) -> None:
    """Print how many tokens pictures of common sizes have, before and after; refuse models that are not served."""
    from transformers import AutoProcessor

    from foveate.vllm.saving import SIZES, saving
    from foveate.vllm.settings import check_served

    hush()
    config = read_config(model)
    m_rope = "mrope_section" in (getattr(config.get_text_config(), "rope_parameters", None) or {})
    try:
        check_served(config.architectures or [], model)
        family = settings.check_model(config, m_rope)
        processor = AutoProcessor.from_pretrained(model)
        rows = [saving(processor, config, family, settings.method.keep, size) for size in SIZES]
    except (ValueError, OSError, ImportError) as error:
        raise Mistake(one_line(error)) from error
    typer.echo(f"image tokens with {settings.method.name} keep={settings.method.keep}:")
    for (width, height), before, after in rows:
        typer.echo(f"  {width:>5} x {height:<5} {before:>6} -> {after:<6} ({after / before:.0%})")


def _command(model: str, options: dict[str, Any], settings: Settings, more: Sequence[str]) -> list[str]:
    """What is run. Other overrides of the configuration among the options go along."""
    rest, overrides = list(more), {}
    for at, word in enumerate(more):
        name, equals, value = word.partition("=")
        if name in ("--hf-overrides", "--hf_overrides"):
            taken = 1 if equals else 2
            try:
                overrides = json.loads(value if equals else more[at + 1])
            except (ValueError, IndexError) as error:
                raise Mistake(f"--hf-overrides must be JSON: {one_line(error)}") from error
            if not isinstance(overrides, dict) or "foveate" in overrides:
                raise Mistake("--hf-overrides must be a JSON object without foveate, which this command writes itself")
            del rest[at : at + taken]
    command = ["vllm", "serve", model, "--hf-overrides", json.dumps({**overrides, "foveate": options})]
    if settings.lowest != settings.highest and "--trust-request-mm-kwargs" not in rest:
        command.append("--trust-request-mm-kwargs")  # without it vLLM takes no keep from requests
    return [*command, *rest]


def _program() -> str:
    """vLLM's own command, of this environment."""
    import importlib.util
    from importlib.metadata import version

    from foveate.vllm.settings import VERSIONS, supported

    if importlib.util.find_spec("vllm") is None:
        raise Mistake(f'vLLM is not installed: pip install "vllm{VERSIONS}", or see docs/serving.md for CPUs')
    if not supported(version("vllm")):
        raise Mistake(f"foveate serves with vllm{VERSIONS}, and this is {version('vllm')}: install one of those")
    beside = Path(sys.executable).with_name("vllm")
    program = str(beside) if beside.is_file() else shutil.which("vllm")
    if program is None:
        raise Mistake("vLLM is installed without its command `vllm`: install it anew")
    return program
