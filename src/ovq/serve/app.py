"""The routes of the server: OpenAI's for models, completions and chats, and our own for contexts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ovq.hf.context import Context
from ovq.prompts import chat_of_note, note_of_chat
from ovq.runtime.files import TemporaryFolder
from ovq.serve.answers import Answers, Usage, disconnected, pieces
from ovq.serve.bodies import parsed
from ovq.serve.chat import ChatRequest
from ovq.serve.contexts import Contexts
from ovq.serve.engine import Engine
from ovq.serve.errors import (
    APIError,
    ClientGone,
    bad_field,
    bad_request,
    failed,
    not_stored,
    shown,
    timed_out,
)
from ovq.serve.grammars import Constraint, Grammars
from ovq.serve.guard import UPLOAD, Guard, body_pieces, check_size, content_type
from ovq.serve.jobs import ContextEvent, Generation, Reading
from ovq.serve.limits import Limits
from ovq.serve.metrics import Metered, Metrics
from ovq.serve.model import ServedModel
from ovq.serve.replies import ChatForm, CompletionForm, Form, stream, whole
from ovq.serve.responses import EventStream, error_response
from ovq.serve.schemas import CompletionRequest, ContextRequest, GenerationRequest
from ovq.serve.texts import LONG, Texts
from ovq.serve.tools import ToolCalls

_log = logging.getLogger("ovq.serve")

Found = TypeVar("Found")

_COMPLETION_TOKENS = 16
"""Tokens of a completion that does not give `max_tokens`, as in OpenAI's API; fewer if the limit is lower."""


class Service:
    """A model, its name in requests, and everything needed to answer them.

    Without a tokenizer (of transformers), the model reads token ids.
    """

    def __init__(
        self,
        *,
        name: str,
        served: ServedModel,
        tokenizer: Any | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.name, self.served, self.limits = name, served, limits or Limits()
        self.engine = Engine(served, self.limits)
        self.contexts = Contexts(max_contexts=self.limits.max_contexts)
        self.texts = Texts(tokenizer, vocab_size=served.vocab_size)
        # One after another, as all at once would take every thread from short texts.
        self.long_texts = ThreadPoolExecutor(1)
        self.grammars = Grammars(self.texts, vocab_size=served.vocab_size, ends=served.ends)
        self.metrics = Metrics(self.engine, self.contexts)
        self.created = int(time.time())


def create_app(
    service: Service, *, api_key: str | None = None, hosts: Sequence[str] | None = None
) -> FastAPI:
    """The application, for uvicorn or another ASGI server with one worker. Its lifespan runs the engine.

    Args:
        api_key: Bearer token that clients must send; None for no key.
        hosts: Allowed values of the header `Host`; None for all.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)

    # No documentation pages, as they load scripts from other hosts.
    app = FastAPI(title="ovq serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    routes = _Routes(service)
    for method, path, call in (
        ("GET", "/health", routes.health),
        ("GET", "/metrics", routes.metrics),
        ("GET", "/v1/models", routes.models),
        # Any path, as names of models may have slashes.
        ("GET", "/v1/models/{name:path}", routes.one_model),
        ("POST", "/v1/completions", routes.completions),
        ("POST", "/v1/chat/completions", routes.chat),
        ("GET", "/v1/contexts", routes.contexts),
        ("POST", "/v1/contexts", routes.make_context),
        ("GET", "/v1/contexts/{name}", routes.one_context),
        ("DELETE", "/v1/contexts/{name}", routes.delete_context),
    ):
        app.add_api_route(path, call, methods=[method], response_model=None)
        if method == "GET":
            # As health checks ask (`wget --spider`); uvicorn leaves the body out.
            app.add_api_route(path, call, methods=["HEAD"], response_model=None, include_in_schema=False)
    for kind in (APIError, HTTPException, ClientGone, Exception):
        app.add_exception_handler(kind, _answer_to_error)
    app.add_middleware(Guard, routes=app.routes, limits=service.limits, api_key=api_key, hosts=hosts)
    # Added last, it is the outermost.
    app.add_middleware(Metered, metrics=service.metrics)
    return app


async def _answer_to_error(request: HTTPRequest, error: Exception) -> Response:
    if isinstance(error, ClientGone):
        return Response(status_code=ClientGone.status)
    if isinstance(error, HTTPException):
        error = APIError(error.status_code, f"{request.method} {shown(request.url.path)}: {error.detail}")
    elif not isinstance(error, APIError):
        error = failed()
    return error_response(error)


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service, self._limits = service, service.limits

    async def health(self) -> Response:
        is_running = self._service.engine.is_running
        content = {"status": "ok" if is_running else "stopped"}
        return JSONResponse(content, status_code=200 if is_running else 503)

    async def metrics(self) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._about_model()]})

    async def one_model(self, name: str) -> Response:
        self._check_model(name)
        return JSONResponse(self._about_model())

    async def completions(self, request: HTTPRequest) -> Response:
        deadline, fields = self._deadline(), parsed(CompletionRequest, await request.body())
        max_tokens = fields.max_tokens or min(_COMPLETION_TOKENS, self._limits.max_tokens)
        self._check(fields, max_tokens)
        context = self._context(fields)
        if self._chat_before(context, is_chat=False)[0]:
            expected = "expected /v1/chat/completions with one that has read a chat"
            raise bad_field("context", f"{expected}, found /v1/completions")
        prompts: Sequence[Any] = [fields.prompt] if isinstance(fields.prompt, str) else fields.prompt
        if not prompts or isinstance(prompts[0], int):
            prompts = [prompts]
        if len(prompts) > (most := self._limits.max_queue):
            raise bad_field("prompt", f"expected at most {most} prompts, found {len(prompts)}")
        texts = self._service.texts
        is_long = sum(len(prompt) for prompt in prompts if isinstance(prompt, str)) > LONG
        encode = functools.partial(texts.encode, param="prompt", is_start=context is None, is_long=is_long)
        ids = await self._in_time(
            request, lambda: [encode(prompt) for prompt in prompts], deadline, is_long=is_long
        )
        form = CompletionForm(texts)
        return await self._generate(request, deadline, fields, context, ids, max_tokens, form)

    async def chat(self, request: HTTPRequest) -> Response:
        deadline, fields = self._deadline(), parsed(ChatRequest, await request.body())
        given = [n for n in (fields.max_tokens, fields.max_completion_tokens) if n is not None]
        max_tokens = min(given, default=self._limits.max_tokens)
        self._check(fields, max_tokens)
        messages = [message.for_template(place) for place, message in enumerate(fields.messages)]
        tools, grammar = [tool.for_template for tool in fields.offered.values()], fields.grammar
        context = self._context(fields)
        before, read = self._chat_before(context)
        texts, chat = self._service.texts, [*before, *messages]
        calls = [message.get("tool_calls") for message in messages]
        is_long = sum(len(message["content"]) for message in chat) + len(str([tools, calls])) > LONG
        render = functools.partial(texts.chat, chat, tools, read=read, is_long=is_long)
        ids = await self._in_time(request, render, deadline, is_long=is_long)
        constraint = None
        if grammar is not None:
            param = "tools" if tools else "response_format"
            compiled = functools.partial(self._service.grammars.compiled, grammar, param=param)
            constraint = await self._in_time(request, compiled, deadline)
        is_single = fields.parallel_tool_calls is False or constraint is not None
        form = ChatForm(texts)
        make_calls = functools.partial(ToolCalls, fields.offered.keys(), is_single=is_single)
        return await self._generate(
            request,
            deadline,
            fields,
            context,
            [ids],
            max_tokens,
            form,
            constraint=constraint,
            make_calls=make_calls,
        )

    def _context(self, fields: GenerationRequest) -> Context | None:
        """The context of a request. Look it up once: its name may be given to another one meanwhile."""
        return None if fields.context is None else self._service.contexts.get(fields.context)

    @staticmethod
    def _chat_before(
        context: Context | None, *, is_chat: bool = True
    ) -> tuple[list[dict[str, str]], list[int]]:
        """The messages that a context has read as a chat, and their tokens; none of a document."""
        if context is None:
            return [], []
        try:
            return chat_of_note(context.note, num_tokens=context.num_tokens, is_chat=is_chat)
        except ValueError as error:
            raise bad_request(f"context: {error}", param="context") from error

    async def contexts(self) -> Response:
        contexts = self._service.contexts
        return JSONResponse({"object": "list", "data": [contexts.about(name) for name in contexts.names]})

    async def one_context(self, name: str) -> Response:
        return JSONResponse(self._service.contexts.about(name))

    async def delete_context(self, name: str) -> Response:
        self._service.engine.forget(self._service.contexts.remove(name))
        return JSONResponse({"id": name, "object": "context", "deleted": True})

    async def make_context(self, request: HTTPRequest) -> Response:
        """Read a document (JSON), or take what `ovq context build` has made of one (bytes)."""
        is_upload = content_type(request.headers) == UPLOAD
        name = await (self._upload(request) if is_upload else self._read(request))
        return JSONResponse(self._service.contexts.about(name), status_code=201)

    async def _upload(self, request: HTTPRequest) -> str:
        service, name = self._service, request.query_params.get("name", "")
        largest, deadline = self._limits.max_upload_bytes, self._deadline()
        check_size(request.headers, largest=largest)
        with service.contexts.reserved(name), TemporaryFolder("upload") as folder:
            path = Path(folder) / "upload"
            try:
                with path.open("wb") as file:
                    async for data in body_pieces(request.receive, largest=largest, deadline=deadline):
                        await asyncio.to_thread(file.write, data)
            except OSError as error:
                _log.error("an upload could not be stored in %s: %s", folder, error)
                raise not_stored() from error
            try:
                context = await asyncio.to_thread(service.served.load_context, path)
            except ValueError as error:
                # The path of the upload means nothing to the client.
                message = str(error).replace(str(path), f"context {name!r}")
                raise bad_request(message, code="invalid_context") from error
            service.contexts.add(name, context)
        return name

    async def _read(self, request: HTTPRequest) -> str:
        service, deadline = self._service, self._deadline()
        fields = parsed(ContextRequest, await request.body())
        with service.contexts.reserved(fields.name):
            if (fields.text is None) == (fields.token_ids is None):
                raise bad_request("expected one of text and token_ids, found both or neither", param="text")
            param = "token_ids" if fields.text is None else "text"
            given, note, is_long = getattr(fields, param), "", len(fields.text or "") > LONG
            if not fields.chat:
                about: dict[str, Any] = {"param": param, "is_start": True, "is_long": is_long}
                encode = functools.partial(service.texts.encode, given, **about)
                ids = await self._in_time(request, encode, deadline, is_long=is_long)
            elif fields.text is None:
                raise bad_field("chat", "expected a text, found token_ids")
            else:
                document = functools.partial(service.texts.document, fields.text, is_long=is_long)
                ids, messages = await self._in_time(request, document, deadline, is_long=is_long)
                note = note_of_chat(messages, ids)
            # Not in the engine's thread, which would delay running answers.
            await asyncio.to_thread(service.served.prepare)
            answers = Answers(service.engine, request.receive, deadline)
            answers.submit([Reading(tokens=ids, deliver=answers.deliver)])
            async with contextlib.aclosing(answers.events()) as events:
                # The only one of a document.
                event = await anext(events)
            assert isinstance(event, ContextEvent)
            service.contexts.add(fields.name, dataclasses.replace(event.context, note=note))
        return fields.name

    async def _generate(
        self,
        request: HTTPRequest,
        deadline: float,
        fields: GenerationRequest,
        context: Context | None,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        form: Form,
        *,
        constraint: Constraint | None = None,
        make_calls: Callable[[], ToolCalls] = ToolCalls,
    ) -> Response:
        service, most = self._service, self._limits.max_prompt_tokens
        if (longest := max(map(len, prompts))) > most:
            message = f"expected at most {most} tokens, found {longest}"
            raise bad_field(form.param, message, code="context_length_exceeded")
        answers = Answers(service.engine, request.receive, deadline)
        # A constraint excludes `ignore_eos`.
        ends = frozenset() if fields.ignore_eos else (constraint or service.served).ends
        jobs = [
            Generation(
                tokens=prompt,
                deliver=answers.deliver,
                max_tokens=max_tokens,
                context=context,
                sampling=fields.sampling,
                seed=fields.seed,
                choices=range(place * fields.n, (place + 1) * fields.n),
                ends=ends,
                num_logprobs=fields.num_logprobs,
                constraint=constraint,
            )
            for place, prompt in enumerate(prompts)
        ]
        usage = Usage(
            prompt_tokens=sum(map(len, prompts)), context_tokens=0 if context is None else context.num_tokens
        )
        found = pieces(answers, jobs, service.texts, fields.stops, usage, make_calls)
        choices = range(len(prompts) * fields.n)
        answers.submit(jobs)
        timed = service.metrics.timed(found)
        if fields.stream:
            events = stream(
                timed, form, choices, usage, model=service.name, includes_usage=fields.includes_usage
            )
            return EventStream(events, answers.cancel)
        try:
            return JSONResponse(await whole(timed, form, choices, usage, model=service.name))
        finally:
            answers.cancel()

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._limits.request_seconds

    async def _in_time(
        self, request: HTTPRequest, call: Callable[[], Found], deadline: float, *, is_long: bool = False
    ) -> Found:
        """What a call returns, from a thread; APIError if that is after the deadline.

        ClientGone if the client disconnects before, so that others do not wait for its call.
        """
        loop = asyncio.get_running_loop()
        found = loop.run_in_executor(self._service.long_texts if is_long else None, call)
        gone = asyncio.create_task(disconnected(request.receive))
        try:
            either: set[asyncio.Future[Any]] = {found, gone}
            seconds = deadline - loop.time()
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not found.done():
                raise ClientGone if gone.done() else timed_out(self._limits.request_seconds)
            return found.result()
        finally:
            found.cancel()
            gone.cancel()

    def _about_model(self) -> dict[str, Any]:
        service = self._service
        return {"id": service.name, "object": "model", "created": service.created, "owned_by": "ovq"}

    def _check_model(self, name: str) -> None:
        if name != self._service.name:
            raise APIError(
                404,
                f"model: expected {self._service.name!r}, which is served here, found {shown(name)}",
                param="model",
                code="model_not_found",
            )

    def _check(self, fields: GenerationRequest, max_tokens: int) -> None:
        """Refuse what can be refused before texts are tokenized, which may take seconds."""
        limits = self._limits
        self._check_model(fields.model)
        fields.check_together()
        if max_tokens > limits.max_tokens:
            # Chats have two names for it, of which the smaller number counts.
            names = ("max_tokens", "max_completion_tokens")
            name = next(name for name in names if getattr(fields, name, None) == max_tokens)
            raise bad_field(name, f"expected at most {limits.max_tokens}, found {max_tokens}")
        if fields.n > limits.max_rows:
            raise bad_field("n", f"expected at most {limits.max_rows}, found {fields.n}")
