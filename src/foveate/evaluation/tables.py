"""Tables of result folders: chosen columns, one of them spread across, as Markdown or for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.asking.mistake import Mistake
from foveate.asking.options import typed

from .results import Row, read

PERCENT = ("accuracy", "agreement")
NOTHING = "–"  # noqa: RUF001


@dataclass(frozen=True)
class Table:
    """head: a title a column. body: as many cells a row. numeric: which columns are set to the right."""

    head: list[str]
    body: list[list[str]]
    numeric: list[bool]

    def markdown(self) -> str:
        """GitHub's Markdown."""
        lines = [self.head, ["--:" if right else "---" for right in self.numeric], *self.body]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def rich(self) -> Any:
        """For the terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=None, pad_edge=False)
        for column, (title, right) in enumerate(zip(self.head, self.numeric, strict=True)):
            # A number that is cut off would be a wrong one.
            width = max(map(len, [*title.split("\n"), *(line[column] for line in self.body)]))
            table.add_column(Text(title), justify="right" if right else "left", no_wrap=True, min_width=width)
        for line in self.body:
            table.add_row(*map(Text, line))
        return table


def load(folders: Sequence[str | Path]) -> tuple[list[Row], list[Row]]:
    """The rows of all folders, with the settings they were made with as further columns, and each `run.json`."""
    rows, abouts = [], []
    names = [Path(folder).name for folder in folders]
    for name, folder in zip(names, folders, strict=True):
        found, about = read(folder)
        plain = {key: value for key, value in about["settings"].items() if not isinstance(value, (dict, list))}
        results = name if names.count(name) == 1 else str(folder)  # both may be called `eval`
        rows += [{"results": results, **plain, **row} for row in found]
        abouts.append(about)
    if not rows:
        raise Mistake(f"no finished row in {', '.join(map(str, folders))}: let the command run on")
    return rows, abouts


def default_columns(rows: Sequence[Row], abouts: Sequence[Row]) -> list[str]:
    """What was measured: no settings, no place, and the ends of intervals only within their cell."""
    hidden = {"results", "place", *(name for about in abouts for name in about["settings"])}
    hidden -= {name for about in abouts for name in about["keys"]}
    names = list(dict.fromkeys(name for row in rows for name in row))
    ends = {end for name in names for end in _ends(name)}
    return ["results"] * (len(abouts) > 1) + [name for name in names if name not in hidden | ends]


def table(
    rows: Sequence[Row],
    columns: Sequence[str],
    *,
    keys: Sequence[str] = (),
    across: str | None = None,
    where: Sequence[tuple[str, Any]] = (),
    sort: str | None = None,
    intervals: bool = False,
) -> Table:
    """Lay rows out.

    columns: which, in order. keys: those that name a row, which text does anyway. across: a column whose values become
    columns: each number that is no key is shown once for every value, and a row that has none (the untouched model has
    no `keep`) the same under all. where: `(column, value)` pairs; several of one column mean either. sort: a column,
    with `-` in front the largest first. intervals: put "(low to high)" behind numbers that have `_low` and `_high`
    columns.

    Raises:
        Mistake: for a column that no row has, when no row is left, or when two rows would be one because what tells
            them apart is not shown.
    """
    known = dict.fromkeys(name for row in rows for name in row)
    for name in [
        *columns,
        *([across] if across else []),
        *(name for name, _ in where),
        *([sort.lstrip("-")] if sort else []),
    ]:
        if name not in known:
            ends = {end for each in known for end in _ends(each)}
            raise Mistake(f"no column {name!r}; there are {', '.join(each for each in known if each not in ends)}")
    allowed: dict[str, list[Any]] = {}
    for name, value in where:
        # A row without the value that is spread stays, whatever is chosen of it.
        allowed.setdefault(name, [_exact(name, None)] if name == across else []).append(_exact(name, value))
    rows = [row for row in rows if all(_exact(name, row.get(name)) in values for name, values in allowed.items())]
    if not rows:
        raise Mistake(f"no row with {' and '.join(f'{name}={value}' for name, value in where)}")
    if sort:
        name = sort.lstrip("-")
        valued = [row for row in rows if row.get(name) is not None]
        rest = [row for row in rows if row.get(name) is None]
        rows = sorted(valued, key=lambda row: row[name], reverse=sort.startswith("-")) + rest
    if across:
        return _spread(rows, columns, keys, across, intervals)
    return Table(
        [_title(name) for name in columns],
        [[cell(row, name, intervals) for name in columns] for row in rows],
        [_numeric(rows, name) for name in columns],
    )


def _exact(name: str, value: Any) -> Any:
    """What a value is compared by: for Python, a `keep` of 1 (token) equals 1.0 (all tokens)."""
    return repr(value) if name == "keep" else value


def _spread(rows: Sequence[Row], columns: Sequence[str], keys: Sequence[str], across: str, intervals: bool) -> Table:
    names = [name for name in columns if name != across]
    fixed = [name for name in names if name in keys or not _numeric(rows, name)]
    spread = [name for name in names if name not in fixed]
    values = list({_exact(across, row[across]): row[across] for row in rows if row.get(across) is not None}.values())
    if all(isinstance(value, (int, float)) for value in values):
        # Fractions before counts, both from most to least.
        values.sort(key=lambda value: (isinstance(value, int), -value))
    grouped: dict[tuple[Any, ...], dict[Any, Row]] = {}
    for row in rows:
        group = grouped.setdefault(tuple(_exact(name, row.get(name)) for name in fixed), {})
        for value in values if row.get(across) is None else [row[across]]:
            other = group.setdefault(_exact(across, value), row)
            if other != row:
                hidden = [name for name in keys if name not in (*names, across)]
                differ = [name for name in hidden if _exact(name, row.get(name)) != _exact(name, other.get(name))]
                apart = " and ".join(differ) or "a column that tells them apart"
                raise Mistake(
                    f"several rows would be one under {_title(across)} {value}: add {apart} to --columns, "
                    "or choose among them by --where"
                )
    head, numeric = [_title(name) for name in fixed], [_numeric(rows, name) for name in fixed]
    for name in spread:
        for value in values:
            title = f"{_title(across)} {value}"
            head.append(title if len(spread) == 1 else f"{_title(name)}, {title}")
            numeric.append(True)
    body = [
        [cell(next(iter(group.values())), name, intervals) for name in fixed]
        + [cell(group.get(_exact(across, value), {}), name, intervals) for name in spread for value in values]
        for group in grouped.values()
    ]
    return Table(head, body, numeric)


def cell(row: Row, name: str, intervals: bool = False) -> str:
    """One value, in its unit."""
    text = _value(name, row.get(name))
    low, high = _ends(name)
    if intervals and row.get(low) is not None and row.get(high) is not None:
        text += f" ({_value(name, row[low])} to {_value(name, row[high])})"
    return text


def _value(name: str, value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, (bool, str)) or name == "keep":  # as it is written: 1 is a token, 1.0 all of them
        return str(value)
    if _is_share(name):
        return f"{100 * value:.1f}"
    if name.endswith("_bytes"):
        from foveate.engine.report import human_bytes

        return human_bytes(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _is_share(name: str) -> bool:
    return name.partition(":")[0] in PERCENT or name.endswith("_share")


def _title(name: str) -> str:
    what, _, part = name.partition(":")
    title = (part or what).removesuffix("_share").removesuffix("_bytes").replace("_", " ")
    return f"{title} %" if _is_share(name) else title


def _ends(name: str) -> tuple[str, str]:
    what, colon, part = name.partition(":")
    return f"{what}_low{colon}{part}", f"{what}_high{colon}{part}"


def _numeric(rows: Sequence[Row], name: str) -> bool:
    values = [row.get(name) for row in rows]
    return all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in values)


def markdown(
    folders: Sequence[str | Path],
    columns: str | None = None,
    *,
    across: str | None = None,
    where: Sequence[str] = (),
    sort: str | None = None,
    intervals: bool = False,
    command: bool = False,
) -> str:
    """What `foveate table` prints, from its options as they are written."""
    rows, abouts = load(folders)
    chosen = [name.strip() for name in columns.split(",")] if columns else default_columns(rows, abouts)
    pairs = []
    for pair in where:
        name, equals, value = pair.partition("=")
        if not equals:
            raise Mistake(f"--where {pair}: write column=value, such as keep=0.25")
        pairs.append((name.strip(), typed(value.strip())))
    keys = [*dict.fromkeys(name for about in abouts for name in about["keys"]), "results"]
    text = table(rows, chosen, keys=keys, across=across, where=pairs, sort=sort, intervals=intervals).markdown()
    # Some runs only found all rows there; those written by older scripts do not count theirs.
    made = dict.fromkeys(f"`{run['command']}`" for about in abouts for run in about["runs"] if run.get("rows") != 0)
    return f"{text}\n\nMeasured by {' and '.join(made)}." if command else text
