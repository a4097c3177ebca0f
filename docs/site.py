"""A hook of mkdocs: pages that are made from others, links between them, and formulas as MathML.

The pages of the repository stay as they are and lead to each other on any host of git. Here every link is followed to
the page of the site that shows its target; what the site does not show, such as a folder, loses its link.
"""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
# Page of the site -> what it shows, in the repository.
SHOWN = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "training.md": "training/README.md",
    "methods/index.md": "docs/methods.md",
    **{path.name: f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.name != "methods.md"},
}
PAGE_OF = {shown: page for page, shown in SHOWN.items()}
# Title -> modules and their names.
REFERENCE = {
    "Pruning": {"foveate": "prune restore Pruned PruneReport UnsupportedError"},
    "Methods": {"foveate": "get_method method_class Method", "foveate.methods": "method_names register"},
    "Families": {"foveate": "get_family", "foveate.families": "family_names register"},
    "Testing plug-ins": {
        "foveate.testing": "check_method check_family Summary Line",
        "foveate.testing.tiny.base": "Tiny",
    },
    "Bases of methods": {
        "foveate.methods.base": "EncoderMethod VideoMethod LayerMethod DepthMethod GuidedMethod ContrastMethod "
        "CacheMethod CrossMethod",
        "foveate.methods.stepwise": "DecodeMethod",
    },
    "What methods choose from": {"foveate.methods.tokens": "EncoderTokens VideoTokens LayerTokens ImageGroups"},
    "Budgets": {"foveate.methods.budgets": "topk_mask floor_budget token_budget share_out scaled_layers check_range"},
    "Layouts": {"foveate.layout": "ImageLayout Tile", "foveate.families.base": "Family"},
}


def methods_by_place() -> dict[str, dict[str, str]]:
    """Place -> method -> its section of docs/methods.md."""
    text = (ROOT / "docs/methods.md").read_text()
    places: dict[str, dict[str, str]] = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, *sections = re.split(r"^### `(\w+)`\n", part, flags=re.MULTILINE)
        if sections:
            places[title.strip()] = dict(zip(sections[::2], sections[1::2], strict=True))
    return places


METHODS = {name: (place, text) for place, found in methods_by_place().items() for name, text in found.items()}


def overview() -> str:
    """docs/methods.md without the methods, whose pages its tables lead to."""
    text = (ROOT / "docs/methods.md").read_text()
    start = text.index(f"## {next(iter(methods_by_place()))}\n")
    before, behind = text[:start], text[text.index("## Adding a method", start) :]
    named = re.sub(
        r"(?<=[| ])`(\w+)`(?=[, ][^\n]*\|)",
        lambda match: f"[`{match[1]}`](methods.md#{match[1]})" if match[1] in METHODS else match[0],
        before,
    )
    return named + behind


def reference() -> str:
    """The page that mkdocstrings fills from docstrings."""
    parts = ["# Reference", "Options of each method stand on [its page](methods.md)."]
    for title, modules in REFERENCE.items():
        parts.append(f"## {title}")
        for module, names in modules.items():
            parts += [f"::: {module}.{name}\n    options:\n      heading_level: 3" for name in names.split()]
    return "\n\n".join(parts) + "\n"


def which_method() -> str:
    """The section of the README."""
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"^## Which method\?\n(.*?)(?=^## )", readme, re.DOTALL | re.MULTILINE)
    assert section is not None
    return f"# Which method?\n{section[1]}"


class Relinked:
    """Links of one page of the repository, as they stand on a page of the site.

    used: files that it shows, such as pictures.
    """

    def __init__(self, page: str, source: str) -> None:
        self.page, self.source = page, source
        self.used: set[str] = set()

    def __call__(self, text: str) -> str:
        """The text with all links followed; what stands in fences is left alone."""
        parts = re.split(r"(^ *```.*?^ *```)", text, flags=re.DOTALL | re.MULTILINE)
        return "".join(part if part.lstrip().startswith("```") else self._links(part) for part in parts)

    def _links(self, text: str) -> str:
        return re.sub(r"(!?)\[((?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\(([^)\s]+)\)", self._link, text)

    def _link(self, match: re.Match[str]) -> str:
        mark, label, link = match.groups()
        if "://" in link:
            return match[0]
        path, _, anchor = link.partition("#")
        at = posixpath.normpath(posixpath.join(posixpath.dirname(self.source), path)) if path else self.source
        target = self._target(at, anchor)
        return label if target is None else f"{mark}[{label}]({target})"

    def _target(self, at: str, anchor: str) -> str | None:
        if at == "docs/methods.md" and anchor in METHODS:
            page, anchor = f"methods/{anchor}.md", ""
        elif at in PAGE_OF:
            page = PAGE_OF[at]
        elif (ROOT / at).is_file():
            page = at.removeprefix("docs/")
            self.used.add(at)
        else:
            return None
        return posixpath.relpath(page, posixpath.dirname(self.page)) + (f"#{anchor}" if anchor else "")


def pages() -> dict[str, str]:
    """All pages of the site but those that mkdocs makes itself, by name; and the files they show, "" each."""
    texts = {page: (source, (ROOT / source).read_text()) for page, source in SHOWN.items()}
    texts["methods/index.md"] = ("docs/methods.md", overview())
    texts["which-method.md"] = ("README.md", which_method())
    texts["reference.md"] = ("docs/reference.md", reference())
    for name, (_, text) in METHODS.items():
        texts[f"methods/{name}.md"] = ("docs/methods.md", f"# {name}\n{text}")
    found = {}
    for page, (source, text) in texts.items():
        relinked = Relinked(page, source)
        found[page] = relinked(text)
        found |= dict.fromkeys(relinked.used, "")
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as hosts of git make them, and the methods in the navigation, place by place."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    assert config.nav is not None
    listed: list[Any] = [
        {place: [{name: f"methods/{name}.md"} for name in found]} for place, found in methods_by_place().items()
    ]
    config.nav = [{"Methods": [{"All methods": "methods/index.md"}, *listed]} if "Methods" in each else each
                  for each in config.nav]  # fmt: skip
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site is made of `pages`, and of the style."""
    made = [file for file in files if file.src_uri == "site.css" or not (Path(config.docs_dir) / file.src_uri).exists()]
    for name, text in pages().items():
        if text:
            made.append(File.generated(config, name, content=text))
        else:
            made.append(File.generated(config, name.removeprefix("docs/"), abs_src_path=str(ROOT / name)))
    return Files(made)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    block = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'
    return re.sub(block, lambda match: _formula(match[2], match[1] == "div"), html, flags=re.DOTALL)


def _formula(latex: str, alone: bool) -> str:
    latex = unescape(latex).replace(r"\arg", r"\operatorname{arg}")  # the one name that latex2mathml lacks
    return f'<span class="arithmatex">{convert(latex, display="block" if alone else "inline")}</span>'
