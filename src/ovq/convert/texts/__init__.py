"""`default_texts`: the texts that the probe of `ovq convert` reads by default."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def default_texts() -> dict[str, str]:
    """Prose and code that come with the package, by name.

    The prose is Eisenhower's last address on the State of the Union, which is in the public domain as a work
    of the United States government; the code is that of `ovq.convert` itself.

    Example:
        >>> [text[:20] for text in default_texts().values()]
        ['To the Congress of t', '\"\"\"Any pretrained de']
    """
    sources = sorted(_FOLDER.parent.glob("*.py"))
    return {
        "Eisenhower's address of 1961": (_FOLDER / "address.txt").read_text(encoding="utf-8"),
        "the source of ovq.convert": "\n".join(path.read_text(encoding="utf-8") for path in sources),
    }
