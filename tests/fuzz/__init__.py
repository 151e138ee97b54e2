"""Hostile bytes for every parser that reads what strangers wrote.

`samples` are valid inputs of every kind, `mutate` bends them with knowledge of their form, and
`targets` names each parser with its seeds and the only errors it may raise. Two drivers share them:
tests/property/test_fuzz_parsers.py (hypothesis, some seconds, in every test run) and

    python -m tests.fuzz [--seconds 60] [TARGET ...]

(atheris, guided by coverage, in `make soak`). What either finds becomes a file under
`found/<target>/`, which the first one reads for ever after.
"""
