"""Result folders: rows that outlive an interrupt, and the facts that let somebody repeat them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from foveate.asking.mistake import Mistake
from foveate.asking.notes import notes
from foveate.asking.outputs import check_folder

Row = dict[str, Any]
RUN = {"command": str, "settings": dict, "keys": list, "versions": dict, "finished": bool, "runs": list}


class Results:
    """The folder of one command: `rows.csv`, `rows.json` and `run.json`, rewritten after every finished row.

    command: its name, such as "eval", or that of a script. settings: JSON-safe, all that decides what a row with given
    keys holds (model, dtype, device, seeds, ...); a folder takes further rows only under the same settings and
    versions. keys: the columns that name a row, such as ("method", "keep"). folder: None for an unfinished one of the
    same command line under `results/`, or a new one there. complete: to be set to False where rows failed, so that the
    same command goes on in this folder. What was measured by earlier runs is said on stderr when the work is done; a
    run that adds no row to a folder leaves its files alone.

        results = Results(out, "eval", settings, keys=("method", "keep"))  # reads and checks, writes nothing
        with results:
            for method, keep in todo:
                if not results.find(method=method, keep=keep):
                    results.add({"method": method, "keep": keep, "accuracy": measure(method, keep)})

    Raises:
        Mistake: when the folder holds something else.
    """

    def __init__(self, folder: str | Path | None, command: str, settings: Row, *, keys: Sequence[str]) -> None:
        self.command, self.keys = command, tuple(keys)
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self.versions = {name: version(name) for name in ("foveate", "torch", "transformers")}
        self.versions["python"] = platform.python_version()
        self._begun = time.perf_counter()
        self._run: Row = {
            "command": command_line(),
            "commit": _commit(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        self.folder = Path(folder) if folder is not None else self._default()
        self.rows, about = self._open()
        check_folder(self.folder)
        self._runs: list[Row] = about.get("runs", [])
        self._finished: bool = about.get("finished", False)
        self._before = len(self.rows)
        self.complete = True

    def find(self, **keys: Any) -> Row | None:
        """The finished row with these key columns."""
        wanted = self._key(keys)
        return next((row for row in self.rows if self._key(row) == wanted), None)

    def add(self, row: Row) -> None:
        """Take in a finished row and write it to disk. Values: str, int, finite float, bool, None."""
        if self.find(**{name: row[name] for name in self.keys}):
            raise ValueError(f"the row {[row[name] for name in self.keys]} is there already")
        self.rows.append(row)
        self._write(finished=False)

    def due(self, name: str) -> bool:
        """Whether a file that shows the rows must be drawn: they are new, or it is missing, or a run was stopped."""
        return len(self.rows) > self._before or not self._finished or not (self.folder / name).exists()

    @property
    def outcome(self) -> str:
        """The last line of a command: where the results are."""
        idle = self._finished and len(self.rows) == self._before
        return f"nothing new in {self.folder}" if idle else f"wrote {self.folder}"

    def to_json(self) -> str:
        """The settings, and all rows of the folder."""
        about = {"folder": str(self.folder), "command": self.command, "settings": self.settings}
        return json.dumps({**about, "versions": self.versions, "rows": self.rows}, indent=2)

    def _key(self, row: Row) -> str:
        return json.dumps([row[name] for name in self.keys])  # where 1 (token) is not 1.0 (all tokens)

    def __enter__(self) -> Results:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Mistake(f"cannot make the folder {self.folder}: {error.strerror}") from error
        if not self._runs:
            self._write(finished=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        done = self.complete and kind is None
        if len(self.rows) > self._before or not self._runs or (done and not self._finished):
            self._write(finished=done)
        if kind is None and self._before:
            notes().print(self._reused(), markup=False, highlight=False, soft_wrap=True)

    def _reused(self) -> str:
        """How many rows are those of earlier runs, and of which."""
        runs = [run for run in self._runs if run.get("rows")]
        dates = [str(run.get("started", "an unknown day"))[:10] for run in runs]
        commits = [f" (commit {run['commit']})" if run.get("commit") else "" for run in runs]
        several = list(dict.fromkeys(day + commit for day, commit in zip(dates, commits, strict=True)))
        if len(several) > 3:
            several = [f"{min(dates)} to {max(dates)} ({len(runs)} runs)"]
        new = len(self.rows) - self._before
        kept = f"{self._before} row{'s' if self._before > 1 else ''} kept"
        when = f", measured on {', '.join(several)}" if several else ""
        return f"{kept}{when}; {new} measured now{'' if new else ' (another --out measures anew)'}"

    def _write(self, *, finished: bool) -> None:
        run = {**self._run, "seconds": round(time.perf_counter() - self._begun, 1)}
        run["rows"] = len(self.rows) - self._before
        about = {
            "command": self.command,
            "settings": self.settings,
            "keys": self.keys,
            "versions": self.versions,
            "finished": finished,
            "runs": [*self._runs, run] if run["rows"] or not self._runs else self._runs,
        }
        write(self.folder / "run.json", json.dumps(about, indent=1) + "\n")
        write(self.folder / "rows.json", json.dumps(self.rows, indent=1, allow_nan=False) + "\n")
        write_csv(self.folder / "rows.csv", self.rows)

    def _open(self) -> tuple[list[Row], Row]:
        """The rows that are there already, and what `run.json` says about them."""
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return [], {}
        rows, about = read(self.folder)
        if about["command"] != self.command:
            raise Mistake(f"{self.folder} holds results of {about['command']}: give another --out")
        for ours, theirs in ((self.settings, about["settings"]), (self.versions, about["versions"])):
            for name in {**theirs, **ours}:
                if theirs.get(name) != ours.get(name):
                    raise Mistake(
                        f"{self.folder} holds rows with {name} {theirs.get(name)}, not {ours.get(name)}: "
                        "give another --out, or run what it was made with"
                    )
        return rows, about

    def _default(self) -> Path:
        home = Path("results")
        for folder in sorted(home.glob(f"{self.command}-*"), reverse=True):
            try:
                _, about = read(folder)
            except Mistake:
                continue
            same = (about["settings"], about["versions"]) == (self.settings, self.versions)
            if same and not about["finished"] and about["runs"][-1]["command"] == self._run["command"]:
                return folder
        name = f"{self.command}-{datetime.now():%Y-%m-%d}"
        names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
        return next(home / name for name in names if not (home / name).exists())


def read(folder: str | Path) -> tuple[list[Row], Row]:
    """The rows of a result folder, and its `run.json`.

    Raises:
        Mistake: when it is no result folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Mistake(f"{folder} is {'a file' if folder.exists() else 'not there'}: give a folder of results")
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        file = folder / "rows.json"
        rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    except FileNotFoundError as error:
        raise Mistake(f"{folder} is no folder of results: it has no run.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise Mistake(f"cannot read the results in {folder}: {error}") from error
    if not _ours(about, rows):
        raise Mistake(f"{folder} is no folder of results: its run.json or rows.json was written by something else")
    return rows, about


def _ours(about: Any, rows: Any) -> bool:
    """Whether this has the shape of what `Results` writes: other programs use the same names."""
    return (
        isinstance(about, dict)
        and all(isinstance(about.get(name), kind) for name, kind in RUN.items())
        and len(about["runs"]) > 0
        and all(isinstance(run, dict) and isinstance(run.get("command"), str) for run in about["runs"])
        and isinstance(rows, list)
        and all(isinstance(row, dict) for row in rows)
    )


def write(path: Path, text: str) -> bool:
    """Replace a file in one step, so that an interrupt leaves the old or the new one.

    Returns False where it holds this text already: then it is left alone.
    """
    with contextlib.suppress(OSError):
        if path.read_bytes() == text.encode():
            return False
    part = path.with_name(f".{path.name}.part")
    try:
        try:
            part.write_text(text, encoding="utf-8", newline="")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise Mistake(f"cannot write {path}: {error.strerror}") from error
    return True


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Replace a CSV file in one step; its columns are those of all rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = []
    for row in ({name: name for name in names}, *rows):
        line = io.StringIO()
        csv.DictWriter(line, names, lineterminator="\r\n").writerow(row)  # else a lone "\r" would not be quoted
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    write(path, "".join(lines))


def run_script(main: Callable[[], None]) -> None:
    """Run a script that writes results; a mistake ends it with one line and status 2, as in foveate's own commands."""
    try:
        main()
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


def command_line() -> str:
    """What was typed, for `run.json`."""
    program = Path(sys.argv[0])
    script = program.suffix == ".py" and program.name != "__main__.py"
    return shlex.join([*(["python", sys.argv[0]] if script else ["foveate"]), *sys.argv[1:]])


def _commit() -> str | None:
    """The commit foveate runs from, with "-dirty" after changes; None outside its own checkout.

    Results that are being written there are no change of what measures them.
    """
    source = Path(__file__)

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", source.parent, *words], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", source.name)  # not somebody's repository around site-packages
        changed = git("diff", "--name-only", "HEAD", "--", ":(top)", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
