"""`ovq bench`: time, memory and roofline share of OVQ attention, exact attention and windowed attention.

`workloads.py` defines the workloads, `measure.py` the methods of measurement, and `suite.py` the measurements
of a report; `show.py` draws the tables and the figures.
"""

PARTS = ("forward", "forward_backward", "decode", "memory", "stream")
"""What `ovq bench` measures of attention."""
