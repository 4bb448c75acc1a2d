"""Text files are UTF-8 on every system, not what the system prefers: on Windows that is often another."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# ruff's rule (PLW1514) knows only what it can see to be a path.
ALWAYS_TEXT = {"read_text", "write_text"}


def unnamed(tree):
    """Lines of calls that read or write text by the encoding of the system."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        # `os.open` and `Image.open` have no text; methods of paths take the mode first, `open` second.
        is_open = isinstance(node.func, ast.Name) and node.func.id == "open"
        method = node.func.attr if isinstance(node.func, ast.Attribute) else None
        is_path_open = method == "open" and getattr(node.func.value, "id", None) not in ("os", "Image")
        if not (is_open or is_path_open or method in ALWAYS_TEXT):
            continue
        words = {word.arg: word.value for word in node.keywords}
        modes = [word.value for word in [*node.args, *words.values()] if isinstance(word, ast.Constant)]
        is_binary = method not in ALWAYS_TEXT and any(isinstance(m, str) and "b" in m for m in modes)
        if "encoding" not in words and not is_binary:
            yield node.lineno


def test_text_is_read_and_written_as_utf_8():
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for part in ("src", "lab")
        for path in (ROOT / part).rglob("*.py")
        for line in unnamed(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert not found


def test_what_is_missing_would_be_found():
    code = (
        "open(p)\nopen(p, 'rb')\np.open()\nx.read_text()\nx.write_text('b')\nos.open(p, 1)\nopen(p, mode='w')"
    )
    assert list(unnamed(ast.parse(code))) == [1, 3, 4, 5, 7]
