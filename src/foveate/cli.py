"""The command line: ask a model about a picture, with and without pruning, and see what was kept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from ._asking import (
    DTYPES,
    GLIMPSE,
    RUNS,
    TIMED_TOKENS,
    Answer,
    Asker,
    built_in,
    hush,
    load,
    load_guide,
    one_line,
    read_config,
    resolve_device,
)
from ._mistake import Mistake
from ._options import PLACES, guide_option, typed

if TYPE_CHECKING:
    from PIL.Image import Image

    from ._subject import Subject
    from .methods.base import Method

TOGETHER = "See: foveate methods. May be repeated; a+b applies two of them together."
KEEP = "Fraction of each image's tokens (0.25), or tokens per image (64)."
OPTION = "Any other option of the method."
ATTENTION = "Attention: sdpa, eager, flash_attention_2."
SEEDS = 2**63 - 1  # the most that torch takes
GUIDE = "The smaller model of sgl: a hub id or a folder."
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}


class OneLineErrors(TyperGroup):
    """Ends every mistake of the user with exit status 2 and one line on stderr."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; what is not the user's fault still shows its traceback."""
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except Mistake as error:
            status = _complain(str(error))
        except Exception as error:
            # typer's own errors, whichever click it stands on
            if type(error).__name__ == "Abort":  # Ctrl-C
                return sys.exit(130) if kwargs.get("standalone_mode", True) else 130
            if not hasattr(error, "format_message"):
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
                status = 2
            else:
                status = _complain(f"{error.format_message().rstrip('.')} (see: foveate --help)")
        if kwargs.get("standalone_mode", True):
            sys.exit(status if isinstance(status, int) else 0)
        return status


def _complain(message: str) -> int:
    typer.echo(f"foveate: {' '.join(message.split())}", err=True)
    return 2


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keep only the image tokens a vision-language model needs.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"foveate {installed_version('foveate')}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
def ask(
    words: Annotated[list[str], typer.Argument(metavar="IMAGE... QUESTION", show_default=False)],
    model: Annotated[str, typer.Option(help="glimpse (built in), a hub id, or a model folder.")] = GLIMPSE,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="See: foveate methods. May be repeated.",
            show_default="fopru, or what fits",
        ),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Fraction of each image's tokens (0.25), or tokens per image (64).")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="Any other option of the method."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Ask the untouched model too, and measure.")] = False,
    show: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Draw which tokens stayed.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"auto, {', '.join(DTYPES)}.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    attn: Annotated[
        str | None,
        typer.Option(help="Attention: sdpa, eager, flash_attention_2.", show_default="the model's own"),
    ] = None,
    guide: Annotated[str | None, typer.Option(help=GUIDE, show_default="glimpse's own, if glimpse")] = None,
) -> None:
    """Ask a vision-language model about pictures, keeping only part of their tokens.

    foveate ask photo.jpg "What is in the picture?" --method plphp --keep 0.4 --compare
    """
    names, question = _split(words)
    _check_output(show, names)
    options = _parse_options(keep, option or [])
    if dtype not in ("auto", *DTYPES):
        raise Mistake(f"--dtype {dtype} is unknown: use auto, {', '.join(DTYPES)}")

    from ._pictures import open_picture

    pictures = [open_picture(name) for name in names]
    with _status("loading", quiet=as_json):
        device = resolve_device(device)
        loaded, processor, methods = _load(model, method, options, guide, device, dtype, attn)
        asker = Asker(loaded, processor, pictures, question, max_new_tokens)

    with _status("answering", quiet=as_json):
        answers = [asker.ask(m, own, record=show is not None) for m, own in methods]
        variants: list[Method | None] = [m for m, _ in methods]
        if compare:
            answers.insert(0, asker.ask_untouched(answers[0].images))
            variants.insert(0, None)
    if len(answers) > 1:
        with _status("measuring", quiet=as_json):
            asker.time(answers, variants)
    if show is not None:
        _draw(pictures, processor, answers, show)

    if as_json:
        typer.echo(json.dumps(_as_json(model, guide, device, loaded, names, question, answers), indent=2))
    elif len(answers) > 1:
        _print_table(answers, f"{device}, {str(loaded.dtype).removeprefix('torch.')}")
    else:
        Console().print(Text(answers[0].text), soft_wrap=True)
        Console().print(Text(str(answers[0]), style="dim"), soft_wrap=True)
    if show is not None and not as_json:
        Console(stderr=True).print(Text(f"wrote {show}", style="dim"))


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Option(help="glimpse (built in), a hub id, or a model folder.")] = GLIMPSE,
    methods: Annotated[
        str, typer.Option(metavar="all|A,B:OPTION=VALUE,...", help="Methods; the baselines are always among them.")
    ] = "all",
    keep: Annotated[
        str, typer.Option(metavar="KEEP,...", help="Fractions of each image's tokens, or tokens per image.")
    ] = "0.5,0.25,0.1",
    data: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Your own questions: FOLDER/data.jsonl.", show_default="glimpse's"),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="How many questions.", show_default="1008 of glimpse's, all of yours")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    match: Annotated[
        str, typer.Option(help="exact: the answer and nothing else; contains: the answer's words in a row.")
    ] = "exact",
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of random tokens, drawn questions and intervals.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where results go; rows in it are kept.", show_default="results/eval-DATE"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"auto, {', '.join(DTYPES)}.")] = "auto",
    attn: Annotated[
        str | None,
        typer.Option(help="Attention: sdpa, eager, flash_attention_2.", show_default="the model's own"),
    ] = None,
    guide: Annotated[str | None, typer.Option(help=GUIDE, show_default="glimpse's own, if glimpse")] = None,
) -> None:
    """Measure what pruning costs in right answers, by type of question, beside random, uniform and pooling.

    foveate eval --methods fopru,plphp:delta=0.2 --keep 0.5,0.25,0.1
    """
    from .evaluation.evaluate import evaluate, overview

    console = Console(stderr=True)
    results, lost = evaluate(
        model=model,
        methods=methods,
        keep=keep,
        data=data,
        count=count,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        match=match,
        seed=seed,
        out=out,
        device=device,
        dtype=dtype,
        attn=attn,
        guide=guide,
        console=console,
    )
    Console().print(overview(results.rows).rich(), crop=False)
    console.print(Text(results.outcome, style="dim"), soft_wrap=True)
    if lost:
        console.print(Text(f"{len(lost)} rows of the data or of the results are missing: see above"), soft_wrap=True)
        raise typer.Exit(1)


@app.command()
def bench(
    geometry: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Random weights of a real size: 1b, llava-1.5-7b, llava-next-7b, llava-next-mistral-7b, "
            "qwen2.5-vl-7b, llama-3.2-11b-vision.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Or real weights: a hub id, a model folder, or glimpse.", show_default=False)
    ] = None,
    methods: Annotated[str, typer.Option(metavar="all|A,B:OPTION=VALUE,...", help="See: foveate methods.")] = "all",
    keep: Annotated[
        str, typer.Option(metavar="KEEP,...", help="Fractions of each image's tokens, or tokens per image.")
    ] = "0.25",
    batch: Annotated[str, typer.Option(metavar="SIZE,...", help="How many samples run together.")] = "1",
    padded: Annotated[bool, typer.Option("--padded", help="Shorten every second sample, padded on the left.")] = False,
    image_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the picture.", show_default="the architecture's own")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded in every run.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each variant; medians are shown.")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of random weights, inputs and tokens.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where results go; rows in it are kept.", show_default="results/bench-DATE"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[
        str, typer.Option(help=f"auto, {', '.join(DTYPES)}; auto: bfloat16, and what --model was saved in.")
    ] = "auto",
    attn: Annotated[str | None, typer.Option(help=ATTENTION, show_default="the model's own")] = None,
) -> None:
    """Measure what pruning saves in time and memory, beside the untouched model and the best that is possible.

    foveate bench --geometry 1b --methods fopru,fastv,plphp --keep 0.5,0.25
    """
    from .evaluation.bench import bench, overview

    console = Console(stderr=True)
    results, lost = bench(
        model=model,
        geometry=geometry,
        methods=methods,
        keep=keep,
        batch=batch,
        padded=padded,
        image_tokens=image_tokens,
        new_tokens=new_tokens,
        repeat=repeat,
        seed=seed,
        out=out,
        device=device,
        dtype=dtype,
        attn=attn,
        console=console,
    )
    if results.rows:
        Console().print(overview(results.rows).rich(), crop=False)
    console.print(Text(results.outcome, style="dim"), soft_wrap=True)
    if lost:
        for line in lost:
            console.print(Text(f"not measured: {line}"), soft_wrap=True)
        raise typer.Exit(1)


@app.command()
def table(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Folders that foveate wrote.")],
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Which columns.", show_default="all that was measured")
    ] = None,
    across: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Spread its values over columns of their own, such as keep.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only these rows. May be repeated.")
    ] = None,
    sort: Annotated[
        str | None, typer.Option(metavar="[-]COLUMN", help="Order of the rows; -COLUMN: the largest first.")
    ] = None,
    intervals: Annotated[bool, typer.Option("--intervals", help="Show the 95 % intervals.")] = False,
    command: Annotated[bool, typer.Option("--command", help="Name the command that measured it.")] = False,
) -> None:
    """Print results as a Markdown table.

    foveate table results/eval --columns method,accuracy --across keep
    """
    from .evaluation.tables import markdown

    typer.echo(
        markdown(results, columns, across=across, where=where or [], sort=sort, intervals=intervals, command=command)
    )


@app.command()
def check(
    words: Annotated[list[str], typer.Argument(metavar="IMAGE... QUESTION", show_default=False)],
    model: Annotated[str, typer.Option(help="glimpse (built in), a hub id, or a model folder.")] = GLIMPSE,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help=TOGETHER)] = None,
    keep: Annotated[str | None, typer.Option(help=KEEP)] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help=OPTION)] = None,
    steps: Annotated[int, typer.Option(min=1, help="Tokens to generate and compare.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="results/check-DATE")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}, auto; half precision proves less.")] = "float32",
    attn: Annotated[str | None, typer.Option(help=ATTENTION, show_default="the model's own")] = None,
    guide: Annotated[str | None, typer.Option(help=GUIDE, show_default="glimpse's own, if glimpse")] = None,
) -> None:
    """Prove on a model of your own that pruning drops tokens and does nothing else.

    The pruned model answers; then the untouched one repeats the answer with the dropped tokens masked. Their logits
    must be equal, and the KV cache as small as reported. The exit status is 0 when they are, 1 when not.

    foveate check photo.jpg "What is in the picture?" --model llava-hf/llava-1.5-7b-hf --method plphp
    """
    subject = _subject("check", words, model, method, keep, option, guide, device, dtype, attn)

    from .evaluation.check import check

    if not check(subject, steps=steps, out=out):
        raise typer.Exit(1)


@app.command()
def show(
    words: Annotated[list[str], typer.Argument(metavar="IMAGE... QUESTION", show_default=False)],
    model: Annotated[str, typer.Option(help="glimpse (built in), a hub id, or a model folder.")] = GLIMPSE,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help=TOGETHER)] = None,
    keep: Annotated[str | None, typer.Option(help=KEEP)] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help=OPTION)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="results/show-DATE")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"auto, {', '.join(DTYPES)}.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    attn: Annotated[str | None, typer.Option(help=ATTENTION, show_default="the model's own")] = None,
    guide: Annotated[str | None, typer.Option(help=GUIDE, show_default="glimpse's own, if glimpse")] = None,
) -> None:
    """Draw which tokens every layer and head keeps, and where the model looks.

    Writes PNG pictures and show.html, a page with sliders over layers and heads that needs nothing but itself.

    foveate show photo.jpg "What is in the picture?" --method fastv --method plphp --keep 0.4
    """
    subject = _subject("show", words, model, method, keep, option, guide, device, dtype, attn, max_new_tokens)

    from .evaluation.show import show

    show(subject, out=out)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the pruning methods, where they act and where they come from."""
    import foveate

    classes = {name: foveate.method_class(name) for name in foveate.methods()}
    if as_json:
        rows = [
            {
                "name": name,
                "place": cls.place,
                "summary": cls.summary,
                "source": cls.source,
                "options": {f.name: _default(f) for f in dataclasses.fields(cls)},
            }
            for name, cls in classes.items()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = _listing()
    for name, cls in classes.items():
        own = ", ".join(f"{f.name}={_default(f)}" for f in dataclasses.fields(cls))
        more = f"\n{PLACES[cls.place]}; {own}; {cls.source}"
        table.add_row(name, Text.assemble(cls.summary, (more, "dim")))
    Console().print(table)


@app.command()
def families(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the model families, the methods that fit each, and models of it."""
    import foveate

    rows: list[dict[str, Any]] = []
    for name in foveate.families():
        family = foveate.get_family(name)
        assert family is not None
        fitting = [m for m in foveate.methods() if foveate.method_class(m).place in family.places]
        examples = list(family.examples)
        rows.append({"model_type": name, "summary": family.summary, "methods": fitting, "examples": examples})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = _listing()
    for row in rows:
        more = f"\nmethods: {', '.join(row['methods'])}\nsuch as {', '.join(row['examples'])}"
        table.add_row(row["model_type"], Text.assemble(row["summary"], (more, "dim")))
    Console().print(table)


def _listing() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 1, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _default(option: dataclasses.Field[Any]) -> Any:
    return None if option.default is dataclasses.MISSING else option.default


def _split(words: Sequence[str], command: str = "ask") -> tuple[Sequence[str], str]:
    """Images and question; the question comes last."""
    *images, question = words
    looks_like_file = Path(question).suffix.lower() in PICTURES and len(question.split()) == 1
    with contextlib.suppress(OSError):  # too long for a file name: a question
        looks_like_file = looks_like_file or Path(question).exists()
    if looks_like_file and question.strip():
        raise Mistake(
            f'no question: the last argument is {question}; write: foveate {command} {question} "What is this?"'
        )
    if not images:
        raise Mistake(f'no image: write the picture before the question: foveate {command} photo.jpg "{question}"')
    if not question.strip():
        raise Mistake('the question is empty: write one after the image, such as "What is in the picture?"')
    return images, question


def _check_output(show: Path | None, names: Sequence[str]) -> None:
    if show is None:
        return
    if show.suffix.lower() != ".png":
        raise Mistake(f"--show writes PNG: {show} must end in .png")
    if not show.absolute().parent.is_dir():
        raise Mistake(f"--show {show}: no folder {show.parent}; make it first")
    if any(Path(name).resolve() == show.resolve() for name in names):
        raise Mistake(f"--show {show} would overwrite the picture that is asked about: name another file")
    if show.is_dir():
        raise Mistake(f"--show {show} is a folder: name a file in it")


def _parse_options(keep: str | None, pairs: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if keep is not None:
        options["keep"] = typed(keep)
        if not isinstance(options["keep"], (int, float)) or isinstance(options["keep"], bool):
            raise Mistake(f"--keep {keep} is no number: give a fraction (0.25) or tokens per image (64)")
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise Mistake(f"-o {pair}: write name=value, such as -o strategy=row")
        if name in options:
            raise Mistake(f"{name} is given twice: give it once, by --keep or -o")
        options[name] = typed(value.strip())
    return options


def _build(names: Sequence[str], options: dict[str, Any], guide: str | None) -> list[tuple[Method, dict[str, Any]]]:
    """The methods, each with those of the options that it has; an option that none has is a mistake.

    guide: as `guide_option` takes it.
    """
    import foveate

    try:
        classes = [foveate.method_class(name) for name in dict.fromkeys(names)]
        fields = [[f.name for f in dataclasses.fields(cls)] for cls in classes]
        for option in options:
            if not any(option in own for own in fields):
                known = "; ".join(f"{c.name} has {', '.join(own)}" for c, own in zip(classes, fields, strict=True))
                raise Mistake(f"no option {option!r}: {known}")
        own_options = [{name: options[name] for name in options if name in own} for own in fields]
        built = [
            foveate.get_method(c.name, **own, **guide_option(c, own, guide))
            for c, own in zip(classes, own_options, strict=True)
        ]
    except (ValueError, TypeError) as error:
        raise Mistake(one_line(error)) from error
    # `keep` belongs to every label, also where it is the default.
    return [(m, {"keep": m.keep, **own}) for m, own in zip(built, own_options, strict=True)]


def _fitting(config: Any, names: Sequence[str] | None) -> Sequence[str]:
    """The methods asked for, or the family's natural one; checked against the family before weights load."""
    import foveate

    family = foveate.get_family(config.model_type)
    if family is None:
        known = ", ".join(foveate.families())
        raise Mistake(f"{config.model_type} models cannot be pruned; known families: {known} (see: foveate families)")
    fitting = [name for name in foveate.methods() if foveate.method_class(name).place in family.places]
    if not names:
        blind = [name for name in fitting if foveate.method_class(name).source.startswith("baseline")]
        return ["fopru"] if "fopru" in fitting else [name for name in fitting if name not in blind][:1]
    for name in names:
        if name not in fitting:
            place = PLACES[foveate.method_class(name).place]
            others = ", ".join(fitting)
            raise Mistake(f"{name} drops tokens {place}, which {config.model_type} models lack: use {others}")
    return names


def _load(
    model: str,
    names: Sequence[str] | None,
    options: dict[str, Any],
    guide: str | None,
    device: str,
    dtype: str,
    attn: str | None,
) -> tuple[Any, Any, list[tuple[Method, dict[str, Any]]]]:
    """The model and its processor, and what `_build` makes of the methods asked for, or of the model's own."""
    hush()
    named = guide or (GLIMPSE if model == GLIMPSE else None)
    if names:
        _build(names, options, named)  # a wrong name should not wait for the model
    source, dtype = built_in(dtype) if model == GLIMPSE else (model, dtype)
    config = read_config(source)
    methods = _build(_fitting(config, names), options, named)
    load_guide([m for m, _ in methods], guide, source, config, device=device, dtype=dtype)
    return *load(source, config, device=device, dtype=dtype, attn=attn), methods


def _subject(
    command: str,
    words: Sequence[str],
    model: str,
    method: Sequence[str] | None,
    keep: str | None,
    option: Sequence[str] | None,
    guide: str | None,
    device: str,
    dtype: str,
    attn: str | None,
    max_new_tokens: int = 64,
) -> Subject:
    """Read the arguments of a command that looks at a model closely, and load what they name."""
    names, question = _split(words, command)
    options = _parse_options(keep, option or [])
    if dtype not in ("auto", *DTYPES):
        raise Mistake(f"--dtype {dtype} is unknown: use auto, {', '.join(DTYPES)}")

    from ._pictures import open_picture
    from ._subject import Subject, Variant

    pictures = [open_picture(name) for name in names]
    together = [[name.strip() for name in part.split("+")] for part in method or []]
    with _status("loading", quiet=False):
        device = resolve_device(device)
        named = [name for part in together for name in part]
        loaded, processor, methods = _load(model, named, options, guide, device, dtype, attn)
        built = {m.name: (m, own) for m, own in methods}
        variants = [Variant(*zip(*(built[name] for name in part), strict=True)) for part in together or [list(built)]]
        asker = Asker(loaded, processor, pictures, question, max_new_tokens)
    settings = {
        "model": model,
        "images": list(names),
        "question": question,
        "device": device,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attn": loaded.config._attn_implementation,
    }
    if guide is not None:
        settings["guide"] = guide
    return Subject(loaded, processor, asker, pictures, variants, settings)


def _status(doing: str, *, quiet: bool) -> Any:
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    return console.status(doing)


def _draw(pictures: Sequence[Image], processor: Any, answers: Sequence[Answer], path: Path) -> None:
    from . import _pictures

    seen = [_pictures.crop_as_seen(picture, processor.image_processor) for picture in pictures]
    strips = []
    for answer in answers:
        tokens = sum(n for n, _ in answer.images)
        if answer.report is None:
            drawn = [_pictures.draw_kept(picture) for picture in seen]
            legend = str(answer) if answer.alone else f"untouched: {tokens} of {tokens} image tokens"
        else:
            shares, layers, heads = _pictures.kept_shares(answer.report)
            images = answer.report.image_tokens[0]
            drawn = [_pictures.draw_kept(*each) for each in zip(seen, (i.tiles for i in images), shares, strict=True)]
            kept = sum(n for _, n in answer.images)
            legend = f"{answer.label}: {kept} of {tokens} image tokens"
            if any(((share > 0) & (share < 1)).any() for share in shares):
                each = f"{layers} layers x {heads} heads" if heads > 1 else f"{layers} layers"
                legend += f"; the brighter, the more of {each} keep it"
        strips.append(_pictures.strip(drawn, legend))
    try:
        _pictures.arrange(strips, across=len(pictures) == 1).save(path)
    except OSError as error:
        raise Mistake(f"cannot write {path}: {one_line(error)}") from error


def _as_json(
    model: str,
    guide: str | None,
    device: str,
    loaded: Any,
    images: Sequence[str],
    question: str,
    answers: Sequence[Answer],
) -> dict[str, Any]:
    return {
        "model": model,
        "guide": guide,
        "device": device,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "images": list(images),
        "question": question,
        "timing": {"runs": RUNS, "tokens": TIMED_TOKENS} if len(answers) > 1 else None,
        "answers": [answer.to_dict() for answer in answers],
    }


def _print_table(answers: Sequence[Answer], where: str) -> None:
    from .engine.report import human_bytes

    said, cost = Table(box=None, pad_edge=False), Table(box=None, pad_edge=False)
    for table in (said, cost):
        table.add_column(style="bold", no_wrap=True)
    said.add_column("answer")
    for name in ("image tokens", "KV cache", "first token", "per token"):
        cost.add_column(name, justify="right", no_wrap=True)
    for answer in answers:
        kept, tokens = sum(n for _, n in answer.images), sum(n for n, _ in answer.images)
        said.add_row(Text(answer.label), Text(answer.text))
        cost.add_row(
            Text(answer.label),
            f"{kept} of {tokens}",
            human_bytes(answer.kv_bytes),
            "-" if answer.first_token_s is None else f"{1000 * answer.first_token_s:.1f} ms",
            "-" if answer.ms_per_token is None else f"{answer.ms_per_token:.2f} ms",
        )
    note = f"{where}; times: medians of {RUNS} runs in turn, {TIMED_TOKENS} tokens each, after a warm-up"
    console = Console()
    console.print(said, "", cost, Text(note, style="dim"), sep="\n")
    if any(answer.first_token_s is None for answer in answers):
        console.print(Text("-: not timed, as exit_threshold does not stream", style="dim"))
    for answer in answers:
        if answer.alone:
            console.print(Text(str(answer), style="dim"), soft_wrap=True)
