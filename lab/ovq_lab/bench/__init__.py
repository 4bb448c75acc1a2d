"""`ovq bench`: time, memory and roofline share of OVQ attention, exact attention and windowed attention.

`workloads.py` defines the workloads, `measure.py` the methods of measurement, and `suite.py` the measurements
of a report; `show.py` draws the tables and the figures.
"""

from collections.abc import Collection

PARTS = ("forward", "forward_backward", "decode", "memory", "stream")
"""What `ovq bench` measures of attention."""


def check_chosen(flag: str, found: Collection[str], allowed: Collection[str]) -> None:
    """Raise ValueError, naming the option, unless there are names and all of them are allowed."""
    unknown = [name for name in found if name not in allowed]
    if unknown or not found:
        raise ValueError(
            f"{flag}: expected some of {', '.join(allowed)}, found {', '.join(unknown) or 'none'}"
        )
