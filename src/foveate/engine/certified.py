"""What `foveate calibrate` promised of a method: whether this model runs what was calibrated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from ..methods.method import Method, read_certificate
from .target import Target

AGAIN = "run foveate calibrate for it"
NONE = "{path} is no certificate: make one with foveate calibrate --out {path}"


def certified(path: str | Path, method: str | Method | Sequence[Method | str] | None, options: Any) -> tuple[Method]:
    """The method of a certificate.

    method, options: what else was given to `prune`, which must be nothing.

    Raises:
        ValueError: for these, and for a file that is no certificate. OSError: where it cannot be read.
    """
    if method is not None or options:
        raise ValueError("a certificate says which method runs and how much it keeps: give certificate= alone")
    if read_certificate(path) is None:
        raise ValueError(NONE.format(path=path))
    return (Method.from_pretrained(path),)  # which refuses a cascade


def rungs_of(path: str | Path) -> list[Method]:
    """The methods that a certificate asks with, one after the other: of a cascade several, else one.

    Each carries the certificate, for `prune` to check.

    Raises:
        ValueError: for a file that is no certificate. OSError: where it cannot be read.
    """
    promised = read_certificate(path)
    if promised is None or not isinstance(promised.get("method"), dict):
        raise ValueError(NONE.format(path=path))
    if promised.get("policy") != "cascade":
        return [Method.from_pretrained(path)]
    rungs = []
    for keep in promised["rungs"]:
        method = Method.from_dict({**promised["method"], "keep": keep})
        method.certificate = {**promised, "method": _written(method)}  # type: ignore[misc]
        rungs.append(method)
    return rungs


def setting(target: Target) -> dict[str, Any]:
    """What of a model a certificate is bound to, JSON-safe."""
    return {
        "model_type": target.family.model_type,
        "fingerprint": target.host.fingerprint(),
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "attn": target.model.config._attn_implementation,
        "backend": "transformers",
    }


def check_certificate(target: Target, method: Method, *, alone: bool = True) -> None:
    """Refuse a method whose certificate is of something else; one without is fine. alone: whether no other acts.

    Raises:
        UnsupportedError: with what differs, and the way out.
    """
    promised = method.certificate
    if promised is None:
        return
    if not alone:
        raise UnsupportedError(
            f"the certificate is of {method.name} alone: leave the other methods out, or calibrate without a promise"
        )
    if promised.get("method") != (runs := _written(method)):
        theirs = promised.get("method") or {}
        other = [name for name in {**theirs, **runs} if theirs.get(name) != runs.get(name)]
        raise UnsupportedError(
            f"the certificate is of {theirs.get('method')} with another {', '.join(other)} than runs here "
            f"({', '.join(f'{name}={runs.get(name)}, certified {theirs.get(name)}' for name in other)}): {AGAIN}"
        )
    here, theirs = setting(target), promised.get("setting") or {}
    for name, what in (
        ("backend", "backend"),
        ("model_type", "model"),
        ("dtype", "dtype"),
        ("attn", "attention backend"),
        ("fingerprint", "model, by its weights"),
    ):
        if theirs.get(name) != here[name]:
            raise UnsupportedError(
                f"the certificate is of another {what} ({theirs.get(name)}, and this is {here[name]}): load what was "
                f"calibrated, or {AGAIN}"
            )
    check_greedy(target.model.generation_config)


def check_greedy(config: Any, asked: bool | None = None) -> None:
    """Refuse sampling under a certificate. config: of the generation, or None. asked: for sampling, over that."""
    if asked or (asked is None and getattr(config, "do_sample", False)):
        raise UnsupportedError(
            "the certificate is of greedy answers, and this samples: give do_sample=False to generate(), and set "
            "model.generation_config.do_sample = False"
        )


def _written(method: Method) -> dict[str, Any]:
    """As it is read back: JSON knows no tuples."""
    return dict(json.loads(json.dumps(method.to_dict())))
