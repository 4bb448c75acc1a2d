"""Stop sequences, against the plain definition: the text up to the first of them."""

from hypothesis import example, given
from hypothesis import strategies as st

from ovq.serve.texts import StopSequences

LETTERS = st.text(alphabet="ab", max_size=30)


@given(
    pieces=st.lists(LETTERS, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)
)
@example(pieces=["aab"], stops=["ab", "aab"])
def test_text_ends_before_the_first_stop_sequence(pieces, stops):
    found, shown = StopSequences(stops), ""
    for piece in pieces:
        shown += found.push(piece)
        if found.is_stopped:
            break
    else:
        shown += found.finish()
    text = "".join(pieces)
    # A sequence ends an answer when its last letter has come, so which is first depends on its end.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert found.is_stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert any(text.startswith(stop, len(shown)) for stop in stops)


@given(text=LETTERS)
def test_only_what_may_become_a_stop_sequence_is_held_back(text):
    found = StopSequences(["abb"])
    shown = "".join(found.push(letter) for letter in text)
    if not found.is_stopped:
        held = text[len(shown) :]
        assert held in ("", "a", "ab")
        assert "abb".startswith(held)
        assert shown + found.finish() == text
