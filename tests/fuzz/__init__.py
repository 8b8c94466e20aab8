"""Inputs of every kind, changed at random from a recorded seed: refused clearly, or rightly used.

    python -m tests.fuzz --cases 2000 --seed 0 --out docs/measurements/fuzz.jsonl

`structure` reads and writes what has keys, `edits` are changes as data, `mutate` draws them from a
seed, `kinds` says what is changed and which commands read it, `worker` runs commands in a process
that `pool` watches, `judge` says what a refusal must be, `argue` why an acceptance is right.
"""
