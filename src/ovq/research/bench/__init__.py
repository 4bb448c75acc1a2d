"""`ovq bench`: time, memory and roofline share of OVQ attention beside exact and windowed attention.

`workloads.py` says what is run, `measure.py` how it is measured, `suite.py` which measurements make a report,
`show.py` draws the table and the figures.
"""
