"""Serve a model to many clients at once through OpenAI's API: `ovq serve`, described in docs/use/serving.md.

From the model outwards:

    jobs.py          what is asked of the model, and the events in which it answers
    sampling.py      the next tokens of the rows of a batch
    scheduler.py     which rows read in the next step: continuous batching
    model.py         a model of this library or a converted one, as the scheduler uses it
    engine.py        the thread that runs the scheduler
    tools.py         calls of tools in text
    texts.py         text to tokens and back; stop sequences
    grammars.py      answers kept to JSON and to calls of tools (llguidance)
    limits.py        how much one server takes on
    errors.py        refusals in OpenAI's form
    contexts.py      documents that the model has read, by name
    answers.py       the events of a request as they come, until it ends, its client goes or its time is over
    replies.py       answers in the form of OpenAI's objects, whole or as a stream
    responses.py     errors, and answers in pieces (starlette)
    guard.py         keys, hosts and sizes, before a request is looked at (starlette)
    bodies.py        requests out of their JSON (pydantic)
    schemas.py       the fields of requests
    chat.py          the fields of chats, with tools and formats of answers
    metrics.py       numbers for Prometheus (prometheus-client)
    app.py           the routes (FastAPI)
    server.py        sockets and signals (uvicorn)

The last eight need the extra `ovq[serve]`, and so do constraints of `grammars.py`, once one is asked for.
"""
