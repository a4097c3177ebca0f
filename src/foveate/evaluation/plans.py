"""The plans of `foveate reproduce`: TOML that says what is measured, and what others report of it."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from foveate.asking.loading import BUILT_IN, DTYPES, GLIMPSE, check_dtype
from foveate.asking.mistake import Mistake
from foveate.asking.options import variants
from foveate.asking.variant import Variant
from foveate.methods.base import check_keep
from foveate.methods.grammar import label, parse_method
from foveate.methods.places import PLACES

from .accuracy import MATCHES, UNTOUCHED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parents[1] / "plans"
PARTS = {"eval": "[eval]", "bench": "[bench]", "tasks": "[lmms_eval]"}  # what `--only` calls them, and a plan


@dataclass(frozen=True)
class Kind:
    """What a value may be. words: for the one who wrote another. of: the class that a table becomes."""

    words: str
    fits: Callable[[Any], bool]
    of: type | None = None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _list_of(words: str, fits: Callable[[Any], bool]) -> Kind:
    return Kind(f"a list of {words}, at least one", lambda v: isinstance(v, list) and len(v) > 0 and all(map(fits, v)))


def _one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: value in names)


TEXT = Kind("a text", _is_text)
NUMBER = Kind("a number", _is_number)
COUNT = Kind("a whole number of at least 1", lambda value: type(value) is int and value >= 1)
LIMIT = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
TEXTS, NUMBERS = _list_of("texts", _is_text), _list_of("numbers", _is_number)


def _table(of: type) -> Kind:
    return Kind("a table", lambda value: isinstance(value, dict), of)


@dataclass(frozen=True)
class Eval:
    """[eval]: as the options of `foveate eval`."""

    data: Annotated[str | None, TEXT] = None
    count: Annotated[int | None, COUNT] = None
    batch_size: Annotated[int, COUNT] = 32
    max_new_tokens: Annotated[int, COUNT] = 64
    match: Annotated[str, _one_of(*MATCHES)] = "exact"


@dataclass(frozen=True)
class Bench:
    """[bench]: as the options of `foveate bench`; one batch size, so that a method and a keep are one row."""

    new_tokens: Annotated[int, Kind("a whole number of at least 2", lambda v: type(v) is int and v >= 2)] = 32
    repeat: Annotated[int, COUNT] = 5
    batch: Annotated[int, COUNT] = 1


@dataclass(frozen=True)
class Tasks:
    """[lmms_eval]: as the options of `lmms_eval`."""

    tasks: Annotated[list[str], TEXTS]
    limit: Annotated[float | None, LIMIT] = None
    batch_size: Annotated[int, COUNT] = 1
    include_path: Annotated[str | None, TEXT] = None


@dataclass(frozen=True)
class Expected:
    """[[expected]]: a reported figure. what: of what it is, with its unit. keep: None for the untouched model."""

    method: Annotated[str, TEXT]
    what: Annotated[str, TEXT]
    figure: Annotated[float, NUMBER]
    source: Annotated[str, TEXT]
    keep: Annotated[float | int | None, NUMBER] = None


@dataclass(frozen=True)
class Plan:
    """What is measured. name: of the file. methods: each as `grammar` writes it."""

    methods: Annotated[list[str], TEXTS]
    keep: Annotated[list[float | int], NUMBERS]
    title: Annotated[str, TEXT] = ""
    model: Annotated[str | None, TEXT] = None
    dtype: Annotated[str, _one_of("auto", *DTYPES)] = "auto"
    attn: Annotated[str | None, TEXT] = None
    eval: Annotated[Eval | None, _table(Eval)] = None
    bench: Annotated[Bench | None, _table(Bench)] = None
    lmms_eval: Annotated[Tasks | None, _table(Tasks)] = None
    expected: Annotated[Sequence[Expected], Kind("[[expected]] tables", lambda v: isinstance(v, list), Expected)] = ()
    name: str = ""

    @property
    def parts(self) -> list[str]:
        """What there is to run, in the order it runs in."""
        there = {"eval": self.eval, "bench": self.bench, "tasks": self.lmms_eval}
        return [part for part, table in there.items() if table is not None]

    @property
    def text(self) -> tuple[str, str]:
        """Methods and keeps as the commands take them."""
        return ",".join(self.methods), ",".join(map(repr, self.keep))

    def variants(self, places: Sequence[str] = tuple(PLACES), model_type: str = "") -> list[Variant]:
        """Every method at every keep. places: where a model lets methods act."""
        return variants(self.text[0], self.keep, places, model_type)[0]


def shipped() -> list[str]:
    """The names of the plans that foveate brings, the one that runs offline first."""
    return sorted((file.stem for file in SHIPPED.glob("*.toml")), key=lambda name: (name != GLIMPSE, name))


def open_plan(written: str, *, model: str | None = None, data: str | None = None) -> Plan:
    """A plan by its file or name, checked. model, data: what is taken in place of the plan's own.

    Raises:
        Mistake: which names the plan and the key.
    """
    names = shipped()
    path = SHIPPED / f"{written}.toml" if written in names else Path(written)
    if not path.is_file():
        close = difflib.get_close_matches(written, names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise Mistake(f"no plan {written}: {hint}give a TOML file, or one of {', '.join(names)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(f"{written}: this is no TOML that can be read: {error}") from error
    with _naming(written):
        plan = replace(_read(Plan, table, ""), name=path.stem)
        if model is not None:
            plan = replace(plan, model=model)
        if data is not None and plan.eval is None:
            raise Mistake("[eval] is missing, so nothing reads --data: leave it out")
        if data is not None and plan.eval is not None:
            plan = replace(plan, eval=replace(plan.eval, data=data))
        return _checked(plan)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Put a place in front of a mistake."""
    try:
        yield
    except (Mistake, ValueError, TypeError) as error:
        raise Mistake(f"{where}: {' '.join(str(error).split())}") from error


def _read(cls: type, table: dict[str, Any], where: str) -> Any:
    """A table as an object of a class whose fields are its keys. where: in front of the names of keys."""
    hints = get_type_hints(cls, include_extras=True)
    kinds: dict[str, Kind] = {
        name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")
    }
    for name in table:
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise Mistake(f"{where}{name} is no key of a plan: {hint}there are {', '.join(kinds)}")
    missing = [f.name for f in fields(cls) if f.name in kinds and f.default is MISSING and f.name not in table]
    if missing:
        raise Mistake(f"{where}{missing[0]} is missing: it is {kinds[missing[0]].words}")
    values = {}
    for name, value in table.items():
        kind = kinds[name]
        if not kind.fits(value):
            raise Mistake(f"{where}{name} must be {kind.words}, not {value!r}")
        if kind.of is None:
            values[name] = value
        elif isinstance(value, dict):
            values[name] = _read(kind.of, value, f"[{name}] ")
        else:
            places = [f"[[{name}]] {number}: " for number in range(1, len(value) + 1)]
            for each, place in zip(value, places, strict=True):
                if not isinstance(each, dict):
                    raise Mistake(f"{place}must be a table, not {each!r}")
            values[name] = [_read(kind.of, each, place) for each, place in zip(value, places, strict=True)]
    return cls(**values)


def _checked(plan: Plan) -> Plan:
    """The plan with its methods written alike; refuses what could only fail later."""
    if not plan.parts:
        raise Mistake(f"nothing to run: give at least one of {', '.join(PARTS.values())}")
    _check_model(plan)
    with _naming("keep"):
        for keep in plan.keep:
            check_keep(keep)
    labels = []
    for text in plan.methods:
        with _naming(f"methods, {text!r}"):
            labels.append(label(parse_method(text)))
        if labels[-1] == "all":
            raise Mistake("methods, 'all': name each one, what fits differs from model to model")
        with _naming("methods"):
            variants(labels[-1], plan.keep, tuple(PLACES), "")
    plan = replace(plan, methods=list(dict.fromkeys(labels)), title=plan.title or plan.name)
    return replace(plan, expected=[_beside(plan, n, row) for n, row in enumerate(plan.expected, 1)])


def _check_model(plan: Plan) -> None:
    if plan.model is None:
        raise Mistake("model is missing: a hub id, a model folder or glimpse; or give --model")
    path = Path(plan.model).expanduser()
    if (plan.model.startswith((".", "/", "~")) or plan.model.count("/") > 1) and not path.is_dir():
        raise Mistake(f"model {plan.model}: no such folder")
    with _naming("attn"):
        check_dtype(plan.dtype, plan.attn)
    if plan.eval is None:
        return
    data = plan.eval.data
    if data is None and plan.model not in BUILT_IN:
        raise Mistake(f"[eval] data is missing: a folder with a data.jsonl, or {GLIMPSE} for its drawn pictures")
    if data not in (None, GLIMPSE) and not Path(str(data)).is_dir():
        raise Mistake(f"[eval] data {data}: no such folder")


def _beside(plan: Plan, number: int, row: Expected) -> Expected:
    """A reported figure, its method written as in the rows; refused where no row would stand beside it."""
    with _naming(f"[[expected]] {number}"):
        if row.method == UNTOUCHED:
            if row.keep is not None:
                raise Mistake(f"keep is of a method: leave it out of {UNTOUCHED}")
            return row
        name = label(parse_method(row.method))
        found = [variant.keep for variant in plan.variants() if variant.label == name]
        if not found:
            raise Mistake(f"method {row.method} is none of the plan's methods: {', '.join(plan.methods)}")
        if repr(row.keep) not in map(repr, found):
            keeps = ", ".join(map(repr, found))
            raise Mistake(f"keep {row.keep} of {row.method} is none that the plan measures: {keeps}")
        return replace(row, method=name)
