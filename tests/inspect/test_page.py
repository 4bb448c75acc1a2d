"""The page as a file: its data, that nothing of a text becomes part of it, and its colours."""

import base64
import functools
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ovq.inspect import page_bytes, page_html, write_page
from tests.inspect.common import looked_into

DOCS = Path(__file__).parents[2] / "docs" / "use" / "inspect.md"
NASTY = [
    "</script><script>document.title = 'broken'</script>",
    "</script x",
    "</SCRIPT/",
    "<!--<script>",
    "<!-- <script ",
    "]]>",
    "@@SCRIPT@@",
    "&lt;b&gt; \"'`${1}",
    "\x00\x01\x1b\x7f\x85",
    "\u202ertl\u202c",
    "\u2028\u2029",
    "\ud800",
    "\r\n\t ",
    "\U0001f600",
    "",
]


class Elements(HTMLParser):
    """The elements of a page, with what stands in scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.found, self.is_inside = [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])
        self.is_inside = True

    def handle_data(self, data):
        if self.is_inside:
            self.found[-1][2] += data

    def handle_endtag(self, tag):
        self.is_inside = False

    def of(self, tag):
        return [each for each in self.found if each[0] == tag]


def data_of(text):
    [script] = [each for each in Elements(text).of("script") if each[1].get("id") == "data"]
    return json.loads(script[2])


def unpacked(text, dtype, *shape):
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def test_the_data_are_what_was_found():
    found = looked_into([str(i) for i in range(61)], num_heads=4, num_kv_heads=2, merge="nearest")
    # All but kept, and all but lost.
    found.layer(None).kept[0, :2] = 1 - 1e-7, 1e-7
    data, memory = data_of(page_html(found, head=3)), found.layer(None)
    on_slots = np.where(memory.entries[3] >= 0, memory.weights[3], 0)
    first = np.nonzero(on_slots.max(-1) == on_slots.max())[0][-1]
    assert data["first"] == {"layer": 1, "head": 3, "token": first}
    both = looked_into([str(i) for i in range(61)], num_heads=4, mixer_types=["ovq"] * 2)
    heads = [x.shares[..., 1:].sum((1, 2)).argmax() for x in both.layers]
    assert heads[0] != heads[1]
    assert [data_of(page_html(both, layer=i))["first"]["head"] for i in (0, 1)] == heads
    assert data["pieces"] == list(found.pieces)
    assert (data["numGiven"], data["merge"], data["numLayers"], data["convSize"]) == (61, "nearest", 2, 4)
    [layer] = data["layers"]
    sizes = [layer[name] for name in ("layer", "chunkSize", "numHeads", "numKvHeads", "numReads", "numSinks")]
    assert sizes == [1, 4, 4, 2, 8, 0]
    assert (layer["numSlots"], layer["numExact"]) == ([8, 8], [4, 4])
    assert np.array_equal(unpacked(layer["slots"], "<i2", 2, 61), memory.slots)
    assert np.array_equal(unpacked(layer["entries"], "<i2", 4, 61, 8), memory.entries)
    assert np.allclose(unpacked(layer["weights"], "<u2", 4, 61, 8) / 65535, memory.weights, atol=1e-5)
    assert np.allclose(unpacked(layer["shares"], "<u2", 4, 61, 3) / 65535, memory.shares, atol=1e-5)
    kept = unpacked(layer["kept"], "<u2", 2, 61) / 65535
    assert np.allclose(kept, memory.kept, atol=2e-5)
    assert np.array_equal(kept == 1, memory.kept == 1)
    assert np.array_equal(kept == 0, memory.kept == 0)
    moves = [unpacked(of_head, "<i2", -1, 3) for of_head in layer["moves"]]
    for head, rows in enumerate(moves):
        of_head = memory.moves[memory.moves[:, 1] == head]
        assert len(rows)
        assert np.array_equal(rows, of_head[:, [0, 2, 3]])


def test_nothing_of_a_text_becomes_part_of_the_page():
    found = looked_into(NASTY * 3)
    object.__setattr__(found, "name", "<b>&\x00\ud800\u202e</title><script>.txt")
    text = page_html(found)
    assert text.isascii()
    assert data_of(text)["pieces"] == list(found.pieces)
    # Browsers end a script at more than parsers of Python do, so none of its marks may be there.
    raw = text.split('type="application/json">')[1].split("</script>")[0]
    assert json.loads(raw)["pieces"] == list(found.pieces)
    assert not set("<>&") & set(raw)
    elements = Elements(text)
    assert len(elements.of("script")) == 2
    [title] = elements.of("title")
    assert title[2] == "ovq inspect: <b>&\ufffd\ufffd\ufffd</title><script>.txt"
    assert len(elements.of("style")) == 1
    plain = page_html(looked_into(["a"] * 36))
    assert [each[:2] for each in elements.found if each[0] != "meta"] == [
        each[:2] for each in Elements(plain).found if each[0] != "meta"
    ]


def test_the_page_needs_nothing_beside_it():
    text = page_html(looked_into(list("some text")))
    elements = Elements(text)
    [policy] = [x[1]["content"] for x in elements.of("meta") if "http-equiv" in x[1]]
    for tag, place in (("script", 1), ("style", 0)):
        code = elements.of(tag)[place][2]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    for _, attributes, _ in elements.found:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"https?:|url\(|@import|innerHTML|insertAdjacent|document\.write", text)


def test_the_size_of_a_page_is_known_beforehand(monkeypatch):
    found = looked_into(["word "] * 1000, num_heads=4, num_hidden_layers=4, chunk_size=64)
    size = len(page_html(found)) - len(page_html(looked_into(["word "])))
    assert 0.85 < page_bytes(found) / size < 1.15
    monkeypatch.setattr("ovq.inspect.page.MOST_BYTES", 10**5)
    with pytest.raises(
        ValueError, match=r"expected a page of at most 0 MB, found 0 MB for 1,000 tokens of 8 heads"
    ):
        page_html(found)


def test_the_python_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    exec(block, {})
    assert len(data_of((tmp_path / "page.html").read_text())["pieces"]) == 200


def test_views_that_are_not_there_are_refused(tmp_path):
    found = looked_into(list("text"))
    with pytest.raises(ValueError, match="expected an OVQ layer, one of 1, found 0"):
        page_html(found, layer=0)
    with pytest.raises(ValueError, match="head: expected 0 to 1, found 2"):
        write_page(found, tmp_path / "page.html", head=2)
    assert not list(tmp_path.iterdir())


@functools.cache
def themes():
    """The colours of the page by name, light and dark."""
    style = Elements(page_html(looked_into(["a"]))).of("style")[0][2]
    light, dark = re.findall(r":root \{(.*?)\n *\}", style, re.DOTALL)[:2]
    colours = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in (light, dark)]
    return {"light": colours[0], "dark": colours[0] | colours[1]}


def linear(colour):
    part = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    dark, light = sorted(float(linear(x) @ [0.2126, 0.7152, 0.0722]) + 0.05 for x in (one, other))
    return light / dark


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(theme):
    colours = themes()[theme]
    grounds = [name for name in colours if re.fullmatch(r"[flkw]\d", name)]
    assert len(grounds) == 8 + 7 + 5 + 4
    for ground in (*grounds, "page", "card"):
        text = colours["on" if ground[0] == "f" else "ink"]
        assert contrast(text, colours[ground]) >= 4.5, ground
    for ground in ("page", "card"):
        for text in ("soft", "accent"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for mark in ("open", "join", "moved", "bar", *(f"u{i}" for i in (0, 1, 2, 7))):
        assert contrast(colours[mark], colours["page"]) >= 3, mark


# Machado, Oliveira and Fernandes (2009): what colours look like without one kind of cone.
BLIND = {
    "protan": "0.152286 1.052583 -0.204868 0.114503 0.786281 0.099216 -0.003882 -0.048116 1.051998",
    "deutan": "0.367322 0.860646 -0.227968 0.280085 0.672501 0.047413 -0.011820 0.042940 0.968881",
    "tritan": "1.255528 -0.076749 -0.178779 -0.078411 0.930809 0.147602 0.004733 0.691367 0.303900",
}
TO_LMS = np.array([[0.41222147, 0.53633254, 0.05144599], [0.21190350, 0.68069955, 0.10739696],
                   [0.08830246, 0.28171884, 0.62997870]])  # fmt: skip
TO_LAB = np.array([[0.21045426, 0.79361779, -0.00407205], [1.97799850, -2.42859221, 0.45059371],
                   [0.02590404, 0.78277177, -0.80867577]])  # fmt: skip


def oklab(rgb):
    """Ottosson's perceptual colour space, in which black and white are 1 apart."""
    return TO_LAB @ np.cbrt(TO_LMS @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("eyes", [None, *BLIND])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_of_slots_can_be_told_apart(theme, eyes):
    matrix = np.eye(3) if eyes is None else np.array(BLIND[eyes].split(), dtype=float).reshape(3, 3)
    for kind in "fu":
        seen = [oklab(matrix @ linear(themes()[theme][f"{kind}{i}"])) for i in range(8)]
        apart = [np.linalg.norm(seen[i] - seen[j]) for i in range(8) for j in range(i)]
        # About twice what is just noticeable side by side.
        assert min(apart) > 0.04, sorted(apart)[:4]


def test_levels_get_darker_or_stronger_step_by_step():
    for colours in themes().values():
        for kind, number in (("l", 6), ("w", 4), ("k", 5)):
            seen = [oklab(linear(colours[f"{kind}{i + (kind == 'w')}"])) for i in range(number)]
            steps = [np.linalg.norm(a - b) for a, b in zip(seen[1:], seen[:-1], strict=True)]
            assert min(steps) > 0.04, (kind, steps)
