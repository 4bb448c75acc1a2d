"""`default_texts`: the texts that the probe of `ovq convert` reads by default."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def default_texts() -> dict[str, str]:
    """Prose and code that come with the package, by name: fixed texts, as budgets depend on them.

    The prose is Eisenhower's last address on the State of the Union, which is in the public domain as a work
    of the United States government; the code is that of `ovq.convert` as it was in November 2026.

    Example:
        >>> [text[:20] for text in default_texts().values()]
        ['To the Congress of t', '\"\"\"Any pretrained de']
    """
    names = {"Eisenhower's address of 1961": "address.txt", "early source of ovq.convert": "code.txt"}
    return {name: (_FOLDER / file).read_text(encoding="utf-8") for name, file in names.items()}
