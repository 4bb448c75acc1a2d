"""Serve a model to many clients at once through OpenAI's API: `ovq serve`, described in docs/use/serving.md.

The files, from the model outwards; the first line of each says what it does:

    the model     jobs sampling model prefixes scheduler engine
    its text      tools texts grammars
    an answer     limits errors contexts answers replies
    over HTTP     responses guard bodies schemas chat metrics app server

Those in the last row need the extra `ovq[serve]`, and so do requests with constraints (`grammars`).
"""
