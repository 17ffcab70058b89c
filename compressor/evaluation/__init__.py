"""Measuring a variant against its base: protocols, exact divergences, intervals, gates.

`config`, `suites`, `gates` and `results` import no numeric library, since recipes read them;
`run.evaluate_base` and `run.evaluate` are the way in, `summary.compare` pairs two variants.
"""
