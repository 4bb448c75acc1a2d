"""Types and finiteness of the fields of configurations."""

import dataclasses

import pytest

from ovq.fields import check_fields


@dataclasses.dataclass(frozen=True)
class Fields:
    count: int = 1
    share: float = 0.5
    name: str = "a"
    is_on: bool = False
    sizes: tuple[int, ...] = (1, 2)
    limit: int | None = None
    rate: float | str = "count"

    def __post_init__(self):
        check_fields(self, prefix="section.")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"limit": 3},
        {"rate": 0.1},
        {"sizes": ()},
        {"count": -(2**62)},
        {"share": -1e308},
        {"is_on": True, "name": ""},
    ],
)
def test_values_of_the_declared_type_are_taken(fields):
    assert dataclasses.asdict(Fields(**fields)) == dataclasses.asdict(Fields()) | fields


def test_a_whole_number_does_for_a_float_and_is_made_one():
    fields = Fields(share=1, rate=1)
    assert (fields.share, fields.rate) == (1.0, 1.0)
    assert isinstance(fields.share, float)
    assert isinstance(fields.rate, float)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", True, "an integer, found True"),
        ("count", 1.0, "an integer, found 1.0"),
        ("count", "1", "an integer, found '1'"),
        ("count", None, "an integer, found None"),
        ("count", 2**63, "an integer, found 9223372036854775808, which is too large"),
        ("share", float("nan"), "a finite number, found nan"),
        ("share", float("-inf"), "a finite number, found -inf"),
        ("share", 10**400, "a finite number, found 1000"),
        ("share", False, "a finite number, found False"),
        ("share", "0.5", "a finite number, found '0.5'"),
        ("name", 3, "a text, found 3"),
        ("is_on", 1, "true or false, found 1"),
        ("is_on", "true", "true or false, found 'true'"),
        ("sizes", 3, "a tuple, each part an integer, found 3"),
        ("sizes", (1, True), r"a tuple, each part an integer, found \(1, True\)"),
        ("sizes", "12", "a tuple, each part an integer, found '12'"),
        ("limit", 0.5, "an integer or none, found 0.5"),
        ("limit", False, "an integer or none, found False"),
        ("rate", float("inf"), "a finite number or a text, found inf"),
        ("rate", True, "a finite number or a text, found True"),
    ],
)
def test_other_values_are_refused_by_the_name_of_the_field(name, value, message):
    with pytest.raises(ValueError, match=rf"^section\.{name}: expected {message}"):
        Fields(**{name: value})
