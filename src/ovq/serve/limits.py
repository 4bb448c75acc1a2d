"""Limits of one server, so that many clients or large requests cannot exhaust it."""

from __future__ import annotations

import dataclasses

from ovq.fields import check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server. A request that exceeds one is refused with an error that names it.

    Attributes:
        max_rows: Answers generated at the same time, which are the rows of the batch.
        max_queue: Waiting prompts and documents.
        max_prompt_tokens: Tokens of a prompt.
        max_tokens: Tokens of an answer; also the default for chats.
        max_body_bytes: Bytes of a request, except uploads.
        max_upload_bytes: Bytes of an uploaded context.
        max_contexts: Contexts kept.
        read_seconds: Seconds in which the head of a request must arrive, and then its body; not for uploads.
        request_seconds: Seconds from the arrival of a request until its answer must be complete, or until an
            upload must have arrived.
        step_tokens: Prompt and document tokens read between two steps of the running answers. A larger
            number shortens the wait for a first token and lengthens the pauses of running answers.
        max_connections: Open connections. `ovq serve` allows fewer where it may not open more files.
        prefix_bytes: Bytes of states kept, so that later prompts need not be read from the beginning; 0 for
            none.
    """

    max_rows: int = 32
    max_queue: int = 256
    max_prompt_tokens: int = 65_536
    max_tokens: int = 4096
    max_body_bytes: int = 2**23
    max_upload_bytes: int = 2**30
    max_contexts: int = 64
    read_seconds: float = 60.0
    request_seconds: float = 600.0
    step_tokens: int = 512
    max_connections: int = 1024
    prefix_bytes: int = 2**29

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value in vars(self).items():
            least = 0 if name == "prefix_bytes" else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")
            if value <= 0 < least:
                raise ValueError(f"{name}: expected more than 0, found {value}")
