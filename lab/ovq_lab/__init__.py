"""The laboratory of `ovq`: what makes its figures. Mixers to compare with, tasks and corpora, training,
evaluation, benchmarks, and the commands `ovq demo | train | eval | bench | reproduce`.

Imports go one way: runtime, mixers, text, gmr <- tasks <- train, eval <- plots <- bench <- figures <- cli.
Any of these imports `ovq`, which imports none of them.
"""
