"""Put one question to an inference engine about a checkpoint, and compare its answer with ours.

`programs` finds engines, `ask` talks to them, `drivers` run inside their environments, `reference`
computes what they should say, `check` compares, and writes the result into a run's report.
"""
