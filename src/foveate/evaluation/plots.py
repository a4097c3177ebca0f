"""Pictures of results: a curve a method over what is kept, and what is worth its price."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from foveate.methods.places import PLACES

from .results import Row

# Okabe and Ito's colours, which colour-blind readers can tell apart; with a marker each for the ninth and on.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A")
MARKERS = "osD^vPX"
GREY, DARK = "#8a8a8a", "#333333"
DASHES = ((0, (5, 2)), (0, (2, 2)), (0, (5, 1, 1, 1)), (0, (1, 1)))
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "axes.axisbelow": True,
}


def curves(
    rows: Sequence[Row],
    path: Path,
    *,
    x: str = "kept_share",
    y: str = "accuracy",
    xlabel: str = "image tokens kept, %",
    ylabel: str = "right answers, %",
    dashed: Sequence[str] = (),
    bound: str | None = None,
    title: str = "",
) -> None:
    """Draw y over x, a line a method and a panel for each place where methods act.

    rows: with `method`, `place`, and shares under `x` and `y`; the one without a place is the untouched model, drawn
    as a level. dashed: the baselines, drawn grey and dashed in the panel of their place and, those before the LLM, in
    all. bound: a column that is dotted in the colour of each method: the best it could reach.
    """
    import matplotlib
    from matplotlib.figure import Figure

    level = next((row for row in rows if row["place"] is None), None)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row["place"] is not None and row.get(y) is not None:
            lines.setdefault(row["method"], []).append(row)
    # Methods that act together stand where the last of them acts.
    last = {method: line[0]["place"].rpartition("+")[2] for method, line in lines.items()}
    places = [place for place in PLACES if place in last.values()]
    with matplotlib.rc_context(STYLE):
        wide = 2 if len(places) in (2, 4) else min(3, len(places))
        high = -(-len(places) // wide)
        figure = Figure(figsize=(0.6 + 4.2 * wide, 0.4 + 4.2 * high), layout="constrained")
        panels = figure.subplots(high, wide, sharey=True, squeeze=False).flat
        for panel in panels[len(places) :]:
            panel.set_axis_off()
        highest: float = max(
            row[_end(y, "high") if _end(y, "high") in row else y] for row in rows if row.get(y) is not None
        )
        panels[0].set_ylim(0, max(105 * highest, 5))  # also where nothing is right
        for panel, place in zip(panels, places, strict=False):
            own = {m: line for m, line in lines.items() if last[m] == place and m not in dashed}
            blind = {m: line for m, line in lines.items() if m in dashed and line[0]["place"] in (place, "encoder")}
            ends = []
            for index, (method, line) in enumerate([*blind.items(), *own.items()]):
                at = index - len(blind)
                # The baseline of the very place stands out.
                style: dict[str, Any] = {"color": DARK if line[0]["place"] == place else GREY, "linewidth": 1.2}
                style["linestyle"] = DASHES[index % len(DASHES)]
                if at >= 0:
                    style = {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)], "markersize": 4}
                line = sorted(line, key=lambda row: -row[x])
                down = [100 * (row[y] - row.get(_end(y, "low"), row[y])) for row in line]
                up = [100 * (row.get(_end(y, "high"), row[y]) - row[y]) for row in line]
                xs, ys = [100 * row[x] for row in line], [100 * row[y] for row in line]
                panel.plot(xs, ys, **style)
                if bound:
                    panel.plot(xs, [100 * row[bound] for row in line], color=style["color"], linestyle=":", linewidth=1)
                if at >= 0:
                    panel.errorbar(xs, ys, [down, up], fmt="none", color=style["color"], alpha=0.35, linewidth=1)
                ends.append((ys[-1], xs[-1], method, style["color"]))
            if level:
                panel.axhline(100 * level[y], color="black", linewidth=0.8)
                # At the right, where the methods have left it.
                panel.annotate("untouched", (1, 100 * level[y]), (-3, 3), textcoords="offset points", ha="right",
                               xycoords=("axes fraction", "data"), fontsize=8)  # fmt: skip
            panel.set_title(PLACES[place], fontsize=10, loc="left")
            panel.set_xlabel(xlabel)
            panel.set_xscale("log")
            panel.invert_xaxis()
            ticks = sorted({round(100 * row[x]) for line in (blind or own).values() for row in line} | {100})
            panel.set_xticks(_ticks(ticks), [f"{tick:g}" for tick in _ticks(ticks)])
            panel.minorticks_off()
            _label(panel, ends)
        for panel in panels[::wide]:
            panel.set_ylabel(ylabel)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(path, dpi=150)


def pareto(
    rows: Sequence[Row],
    path: Path,
    *,
    x: str = "kv_share",
    y: str = "accuracy",
    xlabel: str = "KV cache after the prefill, % of the untouched model's",
    ylabel: str = "right answers, %",
    title: str = "",
) -> None:
    """Draw every method and keep as a point, and the frontier: points that nothing beats at less of x.

    rows: as in `curves`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = sorted((row for row in rows if row.get(y) is not None), key=lambda row: (row[x], -row[y]))
    frontier: list[Row] = []
    for row in rows:
        if not frontier or row[y] > frontier[-1][y]:
            frontier.append(row)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        panel = figure.subplots()
        for index, place in enumerate([*PLACES, None]):
            some = [row for row in rows if row["place"] == place]
            if some:
                label = "untouched" if place is None else PLACES[place]
                colour = "black" if place is None else COLOURS[index]
                marker = "*" if place is None else MARKERS[index]
                panel.scatter([100 * r[x] for r in some], [100 * r[y] for r in some], s=60 if place is None else 22,
                              color=colour, marker=marker, alpha=0.75, linewidths=0, label=label, zorder=3)  # fmt: skip
        panel.step(
            [100 * r[x] for r in frontier], [100 * r[y] for r in frontier], where="post", color=GREY, linewidth=1
        )
        panel.set_xlabel(xlabel)
        panel.set_ylabel(ylabel)
        panel.set_ylim(0, max(105 * max(row[y] for row in rows), 5))
        panel.set_xscale("log")
        panel.set_xlim(left=45 * min(row[x] for row in rows))  # room for names
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200) if tick > 60 * min(row[x] for row in rows)]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.legend(loc="lower right", frameon=False, fontsize=8)
        for row, better in zip(frontier, [*frontier[1:], None], strict=True):
            # Nothing lies left above the frontier but names; where points stand above each other, that of the highest.
            if row["place"] is not None and (better is None or better[x] > 1.02 * row[x]):
                panel.annotate(f"{row['method']} {row['keep']}", (100 * row[x], 100 * row[y]), (-3, 2),
                               textcoords="offset points", ha="right", fontsize=7)  # fmt: skip
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(path, dpi=150)


def _label(panel: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names right of the panel at their heights, moved apart where they would overlap. ends: (y, x, name, colour)."""
    ends = sorted(ends)
    top = panel.get_ylim()[1]
    for height, (y, x, name, colour) in zip(apart([y for y, *_ in ends], top / 27, top), ends, strict=True):
        panel.annotate(
            name,
            (x, y),
            (1.04, height),
            textcoords=panel.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5, "shrinkA": 0},
        )


def apart(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """The heights, moved so that neighbours are at least `gap` apart and none is above `top`, in their order."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for below, index in pairwise(order):
        moved[index] = max(moved[index], moved[below] + gap)
    limit = top
    for index in reversed(order):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved


def _ticks(ticks: Sequence[float]) -> list[float]:
    """Ticks of a logarithmic axis, without those too close to a larger one."""
    chosen: list[float] = []
    for tick in sorted(ticks, reverse=True):
        if tick > 0 and (not chosen or tick < 0.8 * chosen[-1]):
            chosen.append(tick)
    return chosen


def _end(name: str, end: str) -> str:
    what, colon, part = name.partition(":")
    return f"{what}_{end}{colon}{part}"
