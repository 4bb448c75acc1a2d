"""The paper's claims measured anew, a figure at a time: `ovq reproduce NAME`.

A figure is an object (`plan.py`): lines, each a training run and what the trained model is evaluated on
(`evaluations.py`). `figures.py` has those there are, over the sizes in `presets.py`; `jobs.py` trains and
evaluates, `engine.py` brings a figure about and remembers all that is finished, `results.py` keeps it,
`draw.py`, `page.py` and `tables.py` show it.
"""
