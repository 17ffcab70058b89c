"""Measuring a variant against its base: protocols, exact divergences, intervals, gates.

`config`, `suites`, `gates`, `statistics` and `results` import no torch; `run.evaluate_base` and
`run.evaluate` are the way in.
"""
