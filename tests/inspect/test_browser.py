"""The page in a real browser: pointing, choosing, keys, a phone's width, both themes, and no network."""

import re

import pytest

from ovq.convert import attach
from ovq.inspect import inspect_text, sharing, write_page
from tests.browser import CHROMIUM, Browser
from tests.convert.common import original
from tests.inspect.common import looked_into
from tests.inspect.test_page import NASTY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
WORDS = [f"word{i % 9} " for i in range(115)] + NASTY


@pytest.fixture(scope="module")
def found():
    return looked_into(WORDS, num_heads=4, num_kv_heads=2, merge="nearest", chunk_size=8, num_slots=12)


@pytest.fixture(scope="module")
def path(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(found, path, head=0)
    return path


@pytest.fixture(scope="module")
def browser(path):
    with Browser() as browser:
        yield browser


@pytest.fixture
def opened(browser, path):
    browser.open(path)
    yield browser
    assert browser.problems == []


def test_the_text_is_shown_and_nothing_of_it_is_run(opened, found):
    assert opened.run("document.title") == "ovq inspect: text"
    assert opened.run("document.querySelectorAll('#text > .t').length") == len(WORDS)
    assert opened.run("document.querySelectorAll('#text *').length") == len(WORDS)
    shown = [opened.run(f"document.getElementById('t{115 + i}').textContent") for i in range(len(NASTY))]
    assert shown[0] == NASTY[0]
    assert shown[8] == "\u2400\u2401\u241b<U+007F><U+0085>"
    assert shown[9] == "<U+202E>rtl<U+202C>"
    assert shown[11] == "<U+D800>"
    assert shown[12] == "\u21b5\n\u21e5 "
    assert shown[14] == "\u00b7"
    assert "130 tokens, read by tiny: slots in 1 of 2 layers" in opened.text("#about")


def test_letters_of_a_line_run_as_its_script_does(browser, tmp_path):
    # In Hebrew from the right, with digits, Latin and the name of a control from the left.
    text = "ab \u05e9\u05dc\u05d5\u05dd cd\n\u05e9\u05dc 12 ef \u202egh\nij \u202ekl"
    write_page(looked_into(list(text)), tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    x = browser.run("[...document.querySelectorAll('.t')].map((t) => t.getClientRects()[0].x)")
    lines, begin = [], 0
    for line in text.split("\n"):
        places = range(begin, begin + len(line))
        lines.append("".join(text[i] for i in sorted(places, key=lambda i: x[i])))
        begin += len(line) + 1
    assert lines == ["ab \u05dd\u05d5\u05dc\u05e9 cd", "ef \u202egh 12 \u05dc\u05e9", "ij \u202ekl"]
    # The line before a token that begins a chunk.
    style = "getComputedStyle(document.getElementById('t4'))"
    assert browser.run(f"[{style}.borderRightWidth, {style}.borderLeftWidth]") == ["2px", "0px"]
    assert browser.problems == []


def test_pointing_at_a_token_shows_who_shares_its_slot(opened, found):
    slots = found.layer(None).final_slots[0]
    counts = {slot: int((slots == slot).sum()) for slot in slots}
    token = next(i for i, slot in enumerate(slots) if counts[slot] > 2)
    opened.point(f"#t{token}")
    tip = opened.text("#tip")
    assert f"slot {slots[token]}, shared by {counts[slots[token]]} tokens" in tip
    others = [i for i in range(len(slots)) if slots[i] == slots[token] and i != token]
    named = [int(line.split()[0]) for line in tip.splitlines()[1:7] if line.strip()[0].isdigit()]
    assert named == sorted(others, key=lambda other: abs(other - token))[: len(named)]
    assert named
    opened.point("h1")
    assert opened.run("document.getElementById('tip').hidden")


def test_choosing_a_token_shows_what_it_reads(opened, found):
    memory = found.layer(None)
    opened.point("#t77", click=True)
    said = opened.text("#token")
    assert said.startswith("Token 77")
    assert "Slots hold the 72 tokens merged before" in said
    named = re.findall(r"^(slot (\d+)|exact|itself)$", said.split("attends to here")[1], re.MULTILINE)
    expected = [
        f"slot {entry}" if entry >= 0 else "itself" if entry == -1 - 77 else "exact"
        for entry, weight in zip(memory.entries[0, 77], memory.weights[0, 77], strict=True)
        if weight >= 1 / 65535
    ]
    assert [name for name, _ in named] == expected
    exact = memory.shares[0, 77, 0]
    assert f"{round(100 * exact)} % exact tokens" in said
    slots = memory.final_slots[0]
    marked = opened.run("[...document.querySelectorAll('.t.member')].map((t) => Number(t.id.slice(1)))")
    assert marked == [i for i in range(len(slots)) if slots[i] == slots[77]]
    opened.select("#mode", "reads")
    assert opened.run("document.querySelectorAll('.t.w4').length") > 0


def test_all_tokens_of_a_slot_can_be_reached(browser, tmp_path):
    write_page(looked_into(["a "] * 500, num_slots=1), tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.run("window.list = document.querySelector('.members button.link').closest('.members')")
    said = [browser.run("list.lastChild.textContent")]
    assert browser.run("getComputedStyle(list.querySelector('.link')).color") == "rgb(11, 87, 164)"
    for _ in range(3):
        browser.run("list.querySelector('.link').click()")
        said.append(browser.run("list.lastChild.textContent"))
    number = int(said[0].split()[1])
    assert number > 400
    assert said[1:3] == [f"and {number - shown} more tokens" for shown in (200, 400)]
    shown = browser.run("[...list.children].map((item) => item.textContent.split(' ').find(Boolean))")
    assert len(set(shown)) == number + 4


def test_the_memory_at_an_earlier_time(opened, found):
    opened.select("#time", "3")
    assert opened.text("#time-text") == "24 of 130 tokens"
    assert opened.run("document.querySelectorAll('.t.later').length") == 130 - 24
    counts = opened.run(
        "[...document.querySelectorAll('#glance-table tbody tr')].map((r) => Number(r.cells[1].innerText))"
    )
    assert counts[-1] == sum(counts[:-1]) == 24
    opened.point("#t77", click=True)
    assert "it was not merged yet" in opened.text("#token")
    opened.run(
        "[...document.querySelectorAll('#token .link')].find((b) => /as it was/.test(b.innerText)).click()"
    )
    assert opened.text("#time-text") == "72 of 130 tokens"
    # There are values kept for the end alone.
    opened.select("#mode", "kept")
    assert opened.text("#time-text") == "130 of 130 tokens"
    assert "as it was then" not in opened.text("#token")


def test_levels_of_all_tokens_are_counted(opened, found):
    opened.select("#head", "2")
    opened.select("#mode", "level")
    counts = found.layer(None).counts()[1]
    for level, (low, high) in enumerate(((0, 0), (1, 1), (2, 4), (5, 16), (17, 64))):
        number = opened.run(f"document.querySelectorAll('.t.l{level}').length")
        assert number == ((counts >= low) & (counts <= high)).sum()
    kept = opened.run("document.querySelector('#glance-table tbody tr:last-child').cells[3].innerText")
    assert kept == f"{100 * sharing(found.layer(None), 1).kept_share:.0f} %"
    opened.select("#mode", "kept")
    assert opened.run("document.querySelectorAll('.t.k0, .t.k1, .t.k2, .t.k3, .t.k4').length") == 130


def test_all_can_be_done_by_keys(opened):
    first = opened.run("document.querySelector('.t.chosen').id")
    assert f"Token {first[1:]}" in opened.text("#token")
    opened.run("document.getElementById('text').focus()")
    for key in ("Home", "ArrowRight", "ArrowDown"):
        opened.press(key)
    assert opened.run("document.querySelector('.t.chosen').id") == "t9"
    assert opened.run("document.getElementById('text').getAttribute('aria-activedescendant')") == "t9"
    assert opened.run("document.getElementById('live').textContent").startswith("Token 9, word0")
    opened.press("End")
    assert opened.run("document.querySelector('.t.chosen').id") == "t129"
    opened.press("Escape")
    assert opened.run("document.querySelectorAll('.t.chosen').length") == 0
    names = opened.run(
        "[...document.querySelectorAll('select, input, button')].filter((e) => !e.textContent.trim()"
        " && !e.closest('label') && !e.getAttribute('aria-label')).length"
    )
    assert names == 0


@pytest.mark.parametrize(
    ("button", "focus"),
    [
        ("#slot-table th:nth-child(3) button", "oldest \u2193"),
        ("#heads .head:nth-child(2)", "layer 1, head 2-3"),
        ("#slot-table tr:nth-child(5) .slot", None),
        ("#token-body .reads .slot", None),
        ("#token-body .reads li:nth-child(2) .members button", ""),
        ("#token-body .members .link", ""),
        ("#token-body .small .link", "Show the memory as it was then"),
    ],
)
def test_a_button_keeps_the_focus_when_it_is_used(opened, button, focus):
    """Or the one in its place gets it, of which the beginning is given where it is another."""
    opened.run("document.querySelector('#ages details').open = true")
    box = button.split()[0]
    before = opened.run(f"(window.button = document.querySelector({button!r})).focus() ?? button.innerText")
    opened.run("button.click()")
    assert opened.run(f"document.activeElement.closest({box!r} + ' button')") is not None
    assert opened.run("document.activeElement.innerText").startswith(before if focus is None else focus)


def test_a_hidden_button_gets_no_focus(browser, tmp_path):
    model = attach(original(), num_slots=8, window=16, num_sinks=4, chunk_size=8)
    write_page(inspect_text(model, range(60), [f"{i} " for i in range(60)]), tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.run("window.mode = document.getElementById('mode')")
    browser.run("mode.value = 'kept'; mode.dispatchEvent(new Event('change'))")
    # In these, the button in the place of the one that was used is hidden.
    shown = "document.querySelectorAll('#token-body button:not([hidden])')"
    for token, place in ((28, 5), (52, 2), (57, 3)):
        # A click on the chosen token would leave none chosen.
        for i in (token - 1, token):
            chosen = f"(window.each = document.getElementById('t{i}')).matches('.chosen')"
            browser.run(f"{chosen} || each.click()")
        browser.run(f"(window.each = {shown}[{place}]).focus()")
        browser.run("each.click()")
        assert browser.run("document.activeElement.tagName") == "BUTTON", token


def test_the_raster_is_drawn_and_chooses_tokens(opened, found):
    drawn = (
        "(() => { const c = document.getElementById('raster');"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; const seen = new Set();"
        " for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 250) seen.add(d.slice(i, i + 3).join());"
        " return [...seen]; })()"
    )
    seen = opened.run(drawn)
    # Opening, joining, and slots merged into another.
    assert {"192,79,0", "11,87,164"} <= set(seen)
    assert "merges of a slot into another" in opened.run(
        "document.getElementById('raster').getAttribute('aria-label')"
    )
    # In the first column of marks: a token of the first chunk, which opened a slot of its own.
    opened.run("document.getElementById('raster').scrollIntoView({block: 'center'})")
    x, y, height = opened.run(
        "(() => { const r = document.getElementById('raster').getBoundingClientRect();"
        " return [r.x, r.y, r.height]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        opened.call(
            "Input.dispatchMouseEvent", type=kind, x=x + 46, y=y + height - 48, button="left", clickCount=1
        )
    chosen = opened.run("document.querySelector('.t.chosen')?.id")
    assert chosen in {"t0", "t1", "t2"}


def test_heads_without_slots_are_said_to_drop_tokens(browser, tmp_path):
    pieces = [f"{i} " for i in range(60)]
    model = attach(original(), num_slots=0, window=16, num_sinks=4, chunk_size=8)
    write_page(inspect_text(model, range(60), pieces), tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.point("#t50", click=True)
    said = browser.text("#token")
    assert "This head has no slots and has dropped 32 tokens; all others, up to itself, are exact." in said
    heard = []
    for token in (9, 55):
        browser.run(f"document.getElementById('t{token}').click()")
        heard.append(browser.run("document.getElementById('live').textContent").split(": ")[1])
    assert "Exactly: its chunk is not dropped yet." in browser.text("#token")
    assert heard == ["dropped, this head keeps only its first and last tokens", "exact, in no slot"]


@pytest.mark.parametrize("width", [320, 640, 900, 1280])
def test_the_bar_does_not_cover_what_has_the_focus(path, width):
    with Browser(width, 700) as browser:
        browser.open(path)
        # From below, where the bar stays at the top.
        browser.run("scrollTo(0, document.body.scrollHeight)")
        browser.run("document.querySelector('.skip').click()")
        top = browser.run("document.activeElement.getBoundingClientRect().top")
        bottom = browser.run("document.getElementById('controls').getBoundingClientRect().bottom")
        assert bottom <= top < bottom + 20


@pytest.mark.parametrize("width", [320, 640, 768, 1024, 1280])
def test_names_and_labels_have_room(path, width):
    with Browser(width, 700) as browser:
        browser.open(path)
        # As long as they get.
        browser.run(
            "for (const head of document.querySelectorAll('.head')) { "
            "head.firstChild.textContent = 'layer 29, head 12-15'; "
            "head.lastChild.textContent = '>99 % kept'; }"
        )
        boxes = browser.run(
            "[...document.querySelectorAll('.head > span:not(.stack)')].map((e) => "
            "[e.scrollWidth - e.clientWidth, e.clientHeight / parseFloat(getComputedStyle(e).fontSize)])"
        )
        assert all(over == 0 and lines < 2 for over, lines in boxes)
        assert (
            browser.run(
                "(({scrollWidth: all, clientWidth: seen}) => all - seen)(document.querySelector('#heads'))"
            )
            == 0
        )
        labels = browser.run(
            "[...document.querySelector('.labels').children].map((e) => { "
            "const range = document.createRange(); range.selectNodeContents(e); "
            "const r = range.getBoundingClientRect(); return [r.left, r.right, r.top, r.bottom]; })"
        )
        for i, (left, _, top, bottom) in enumerate(labels):
            for _, right, other_top, other_bottom in labels[:i]:
                assert right < left or bottom <= other_top or other_bottom <= top


def luminance(colour):
    """WCAG's, of three numbers up to 255."""
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("clicked", [".t.chosen", "#t9"])
def test_tokens_that_come_later_are_legible(path, clicked, is_dark):
    """By WCAG's level AA, whether the tokens of a slot are marked or not."""
    with Browser(is_dark=is_dark) as browser:
        browser.open(path)
        browser.select("#time", "3")
        browser.run(f"document.querySelector('{clicked}').click()")
        style = "getComputedStyle(document.querySelector('.t.later'))"
        opacity = float(browser.run(f"{style}.opacity"))
        ground_style = "getComputedStyle(document.getElementById('text'))"
        ink, ground = (
            [float(part) for part in re.findall(r"[\d.]+", browser.run(name))]
            for name in (f"{style}.color", f"{ground_style}.backgroundColor")
        )
        ink = [a * opacity + b * (1 - opacity) for a, b in zip(ink, ground, strict=True)]
        dark, light = sorted([luminance(ink), luminance(ground)])
        assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("width", [794, 1280])
def test_paper_has_all_of_the_text_and_its_colours(tmp_path, width):
    write_page(looked_into([f"word{i % 9} " for i in range(2000)]), tmp_path / "page.html")
    with Browser(width, 900) as browser:
        browser.open(tmp_path / "page.html")
        browser.run("document.getElementById('all-heads').open = true")
        browser.call("Emulation.setEmulatedMedia", media="print")
        for box in ("text", "token", "heads"):
            element = f"document.getElementById('{box}')"
            assert browser.run(f"{element}.scrollHeight - {element}.clientHeight") == 0
        style = "getComputedStyle(document.querySelector('.t'))"
        assert browser.run(f"{style}.printColorAdjust") == "exact"


@pytest.mark.parametrize("is_dark", [False, True])
def test_a_phone_shows_all_without_moving_sideways(path, is_dark):
    with Browser(320, 640, is_dark=is_dark) as browser:
        browser.open(path)
        browser.point("#t77", click=True)
        assert browser.text("#token").startswith("Token 77")
        assert browser.run("document.documentElement.scrollWidth") == 320
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 23, 27)" if is_dark else "rgb(255, 255, 255)")
        assert browser.problems == []
