"""Reproduction of the paper's claims, one figure at a time: `ovq reproduce NAME`.

A figure (`plan.py`) has lines: training runs, with evaluations of the trained models (`evaluations.py`).
`figures.py` lists the figures, with sizes from `presets.py`; `jobs.py` trains and evaluates; `engine.py`
makes a figure and reuses all that is finished; `results.py` stores it; `ovq_lab.plots.draw`, `page.py` and
`tables.py` show it.
"""
