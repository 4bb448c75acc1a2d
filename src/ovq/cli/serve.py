"""`ovq serve`: answer requests over HTTP, as OpenAI's API does."""

from __future__ import annotations

import importlib.util
import math
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovq.cli import options
from ovq.cli.common import read_text
from ovq.cli.loading import check_generating_folder, load_any_model, load_tokenizer

if TYPE_CHECKING:
    from ovq.serve.app import Service

_KEY_VARIABLE = "OVQ_API_KEY"
_MIB = 2**20


def serve(
    model: options.Model,
    context: Annotated[
        list[str] | None,
        typer.Option(
            help="File of ovq context build for requests to name: NAME=FILE, or FILE for its name without "
            "the ending; can be given several times."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests; default: that of its folder.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines connect.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the API key that clients must send, instead of the environment variable "
            f"{_KEY_VARIABLE}."
        ),
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Most answers generated at the same time.")] = 32,
    max_queue: Annotated[int, typer.Option(min=1, help="Most prompts and documents that wait.")] = 256,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt.")] = 65_536,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 4096,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request in MiB, except uploads.")] = 8,
    max_upload: Annotated[int, typer.Option(min=1, help="Largest uploaded context in MiB.")] = 1024,
    max_contexts: Annotated[int, typer.Option(min=1, help="Most contexts kept.")] = 64,
    timeout: Annotated[
        float, typer.Option(help="Seconds until a request that is not answered is ended.")
    ] = 600.0,
    read_timeout: Annotated[
        float, typer.Option(help="Seconds in which a request must arrive, except uploads.")
    ] = 60.0,
    prefix_cache: Annotated[
        int,
        typer.Option(
            min=0,
            help="MiB of cached states, so that the common beginning of prompts is read once; 0 for none.",
        ),
    ] = 512,
    step_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of prompts read between two decode steps of the running answers."),
    ] = 512,
    shutdown_seconds: Annotated[
        int, typer.Option(min=0, help="Seconds for running answers to finish after Ctrl-C or SIGTERM.")
    ] = 30,
    num_slots: options.NumSlots = None,
    merge: options.MergeRule = None,
    logn_length: options.LognLength = None,
    state_dtype: options.StateDtype = None,
    weight_dtype: options.WeightDtype = None,
    seed: options.SlotSeed = 0,
) -> None:
    """Serve a model to many clients at once, through OpenAI's API.

    Example: [bold]ovq serve --model runs/lm --context book.ctx[/bold], and then
    [bold]curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "lm",
    "prompt": "Who", "context": "book"}'[/bold]

    After Ctrl-C or SIGTERM, running answers are completed first. See docs/use/serving.md.
    """
    for option, seconds in (("--timeout", timeout), ("--read-timeout", read_timeout)):
        if not 0 < seconds < math.inf:
            raise ValueError(f"{option}: expected a finite number above 0, found {seconds}")
    if name is not None and not name.strip():
        raise ValueError(f"--name: expected a name, found {name!r}")
    check_generating_folder(model)
    files = [_context_file(given) for given in context or []]
    key = _api_key(api_key_file)
    _check_installed()

    from ovq.serve.limits import Limits
    from ovq.serve.server import bound_socket, connections_within_files

    connections = connections_within_files(Limits.max_connections)
    if connections < Limits.max_connections:
        warning = f"at most {connections} connections, as it may not open more files (ulimit -Hn)"
        typer.echo(f"ovq serve: warning: {warning}", err=True)
    limits = Limits(
        max_rows=max_rows,
        max_queue=max_queue,
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        max_body_bytes=max_body * _MIB,
        max_upload_bytes=max_upload * _MIB,
        max_contexts=max(max_contexts, len(files)),
        read_seconds=read_timeout,
        request_seconds=timeout,
        step_tokens=step_tokens,
        max_connections=connections,
        prefix_bytes=prefix_cache * _MIB,
    )
    # Before loading the model, which takes longer: only a server that is loading, too, is noticed after it.
    with bound_socket(host, port) as listener:
        from transformers import set_seed

        from ovq.serve.app import Service
        from ovq.serve.model import ServedModel

        set_seed(seed)
        service = Service(
            name=name or model.resolve().name,
            served=ServedModel(
                load_any_model(
                    model,
                    num_slots=num_slots,
                    merge=merge,
                    logn_length=logn_length,
                    state_dtype=state_dtype,
                    weight_dtype=weight_dtype,
                )
            ),
            tokenizer=load_tokenizer(model),
            limits=limits,
        )
        _add_contexts(service, files)
        _run(service, listener, host=host, key=key, shutdown_seconds=shutdown_seconds)


def _run(
    service: Service, listener: socket.socket, *, host: str, key: str | None, shutdown_seconds: int
) -> None:
    from ovq.runtime.verbosity import is_verbose
    from ovq.serve.app import create_app
    from ovq.serve.server import Server, is_loopback, listen, url_of, uvicorn_config

    # Without a key, the header Host must keep out pages of other sites in a browser on this machine. The URL
    # that is printed names the address of the socket.
    names = dict.fromkeys(("localhost", "127.0.0.1", "[::1]", host.lower(), listener.getsockname()[0]))
    is_local = is_loopback(listener)
    hosts = [*names] if key is None and is_local else None

    def say_ready() -> None:
        typer.echo(_summary(service, url_of(listener), has_key=key is not None), err=True)
        if key is None and not is_local:
            warning = f"everyone who reaches {host} can use it; set {_KEY_VARIABLE}"
            typer.echo(f"ovq serve: warning: {warning}", err=True)

    app = create_app(service, api_key=key, hosts=hosts)
    log_level = "info" if is_verbose() else "warning"
    config = uvicorn_config(app, service.limits, shutdown_seconds, log_level)
    listen(listener)
    Server(config, on_ready=say_ready, on_end=service.engine.stop).run(sockets=[listener])


def _context_file(given: str) -> tuple[str, Path]:
    from ovq.serve.contexts import NAME, NAME_RULE

    name, separator, file = given.partition("=")
    path = Path(file if separator else given)
    name = name if separator else path.stem
    if not path.is_file():
        raise ValueError(f"--context: expected a file of ovq context build, found no file {path}")
    if NAME.fullmatch(name) is None:
        raise ValueError(f"--context: expected a name of {NAME_RULE} (NAME=FILE), found {name!r}")
    return name, path


def _api_key(file: Path | None) -> str | None:
    """The key that clients must send; None for no key."""
    key, source = os.environ.get(_KEY_VARIABLE), _KEY_VARIABLE
    if file is not None:
        key, source = read_text(str(file), flag="--api-key-file").strip(), f"--api-key-file {file}"
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        found = "another one" if key else "an empty one"
        raise ValueError(f"{source}: expected a key of ASCII characters without spaces, found {found}")
    return key


def _check_installed() -> None:
    for name in ("fastapi", "prometheus_client", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"ovq serve: expected the extra 'serve', found no module {name}: pip install 'ovq[serve]'"
            )


def _add_contexts(service: Service, files: Sequence[tuple[str, Path]]) -> None:
    from ovq.serve.errors import APIError

    for name, path in files:
        try:
            with service.contexts.reserved(name):
                service.contexts.add(name, service.served.load_context(path))
        except APIError as error:
            raise ValueError(f"--context: {error.message}") from error


def _summary(service: Service, url: str, *, has_key: bool) -> str:
    """One line with the address, the model and the limits of the server."""
    limits = service.limits
    contexts = ", ".join(service.contexts.names) or "none"
    return (
        f"ovq serve: {url} | model {service.name} on {service.served.device} | contexts: {contexts} | "
        f"{limits.max_rows} rows, {limits.max_queue} waiting, {limits.max_prompt_tokens} prompt tokens, "
        f"{limits.max_tokens} tokens, {limits.request_seconds:g} s, key: {'yes' if has_key else 'none'}"
    )
