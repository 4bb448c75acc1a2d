"""What the site has beyond docs/: pages of the root, the reference of the command line, formulas.

A hook of mkdocs and an extension of griffe, which reads the docstrings; both are named in mkdocs.yml. Links
inside docs/ are relative and work in the repository as they do on the site; those of the pages of the root
are made so here.
"""

from __future__ import annotations

import html
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import griffe
from fontTools import subset
from math_core import LatexToMathML
from mkdocs.structure.files import File, Files
from pymdownx.arithmatex import arithmatex_fenced_format

# What tqdm says in notebooks without ipywidgets would stand in red among the outputs of the tutorials.
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")

_ROOT = Path(__file__).parent
# What each page is made of. The README is not among them: index.md is the site's own first page.
_PAGES = {"contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md", "changelog.md": "CHANGELOG.md"}
# Formulas become MathML, which browsers show without a program. Their font comes with ziamath.
_MATHML = LatexToMathML()
_FONT = files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
# In a line, with what follows without a space.
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>([,.;:)]*)', flags=re.DOTALL
)
_CHARACTERS: set[str] = set()


class Examples(griffe.Extension):
    """Has the sections `Example:` of docstrings shown as code, which griffe knows by their plural alone.

    Also shows the types and defaults of `OVQConfig`.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for everything that is read."""
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
        # transformers makes a dataclass of a config, which cannot be seen in the source.
        if obj.name == "OVQConfig":
            text = re.sub(r"^( *)Args:$", r"\1Attributes:", text, flags=re.M)
            for name, field in obj.members.items():
                if isinstance(field, griffe.Attribute) and field.value is not None:
                    text = re.sub(rf"^( +{name}): ", rf"\1: `{field.value}`: ", text, flags=re.M)
        obj.docstring.value = text


def on_config(config: Any) -> Any:
    """The addresses of the site, which its map and the page for missing pages need, and of the repository.

    They are those of who builds it.
    """
    config.site_url = os.environ.get("SITE_URL") or None
    if owner_and_name := os.environ.get("OVQ_REPOSITORY"):
        config.repo_url, config.repo_name = f"https://github.com/{owner_and_name}", owner_and_name
    # Displayed formulas are blocks of `math`, which code hosts show too.
    display = {
        "name": "math",
        "class": "arithmatex",
        "format": arithmatex_fenced_format(mode="generic", tag="div"),
    }
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [display]}
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for name, source in _PAGES.items():
        text = re.sub(r"\]\(docs/", "](", (_ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "cli.md", content=command_line()))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML; one that cannot be read ends the build."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    is_displayed = found[1] == "div"
    latex, *number = re.split(r"\\tag\{(.*)\}", html.unescape(found[2]).strip())
    formula = _MATHML.convert_with_local_state(latex, displaystyle=is_displayed)
    _CHARACTERS.update(formula)
    if not is_displayed:
        return f'<span class="formula">{formula}{found[3]}</span>'
    # The number stands outside, where it stays in sight while a wide formula is scrolled.
    shown = f"<span>({number[0]})</span>" if number else ""
    return f'<div class="formula" data-search-exclude><div>{formula}</div>{shown}</div>'


def on_post_build(config: Any) -> None:
    """Write the part of the font that formulas use: their characters, and what browsers make of these."""
    options = subset.Options(flavor="woff")
    font = subset.load_font(str(_FONT), options)
    part = subset.Subsetter(options)
    # A letter is shown as one of the italics, Latin or Greek; roots and primes have elements of their own.
    italics = (*range(0x1D434, 0x1D468), 0x210E, *range(0x1D6E2, 0x1D71C))
    part.populate(text="\u221a\u2032" + "".join(_CHARACTERS), unicodes=italics)
    part.subset(font)
    subset.save_font(font, str(Path(config.site_dir) / "assets" / "math.woff"), options)


def command_line() -> str:
    """The help of all commands as a page."""
    # typer, and all that the commands name in their help, are loaded only where the page is built.
    from ovq.cli import _program

    parts = ["# The command line\n\nEvery command takes `-q`, `-v` and `--help`.\n"]
    _describe(_program(), "ovq", parts)
    return "\n".join(parts)


def _describe(command: Any, name: str, parts: list[str]) -> None:
    children = getattr(command, "commands", {})
    if name != "ovq" and (not children or command.params):
        parts.append(f"## `{name}`\n\n{_plain(command.help or '')}\n")
        options = [option for option in command.params if option.name not in ("quiet", "verbose", "help")]
        rows = [_row(option) for option in options if not getattr(option, "hidden", False)]
        if rows:
            head = ["| option | default | what it does |", "| --- | --- | --- |"]
            parts.append("\n".join([*head, *rows]) + "\n")
    for child, inner in sorted(children.items()):
        _describe(inner, f"{name} {child}", parts)


def _row(option: Any) -> str:
    names = option.opts if option.param_type_name == "option" else [option.name.upper()]
    default = option.default
    shown = f"`{default}`" if isinstance(default, (str, int, float)) and not isinstance(default, bool) else ""
    help_text = " ".join(_plain(getattr(option, "help", None) or "").split()).replace("|", "\\|")
    return f"| {', '.join(f'`{found}`' for found in names)} | {shown} | {help_text} |"


def _plain(text: str) -> str:
    """Help without the marks that rich and click read: colours, and \\b before lines to keep as they are."""
    return re.sub(r"\[/?[a-z][a-z ]*\]", "", text.replace("\b", ""))
