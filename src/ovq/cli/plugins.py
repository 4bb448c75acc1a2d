"""`--import MODULE`, which every command takes: tasks and mixers of the user's own."""

from __future__ import annotations

from typing import Annotated

import typer


def _import(modules: list[str]) -> None:
    from ovq.plugins import import_module

    for module in modules:
        import_module(module)


Import = Annotated[
    list[str],
    typer.Option(
        "--import",
        metavar="MODULE",
        callback=_import,
        is_eager=True,
        expose_value=False,
        help="Import a module of yours first, which registers tasks or mixers; can be given several times.",
    ),
]
