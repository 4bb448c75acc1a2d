"""`ovq bench`: time, memory and roofline share of OVQ attention, exact attention and windowed attention.

`workloads.py` defines what is run, `measure.py` how it is measured, and `suite.py` which measurements make a
report; `show.py` draws the tables and the figures.
"""
