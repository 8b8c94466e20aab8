"""`python -m lorax.cli`: the commands where `lorax` is not installed."""

from lorax.cli.main import run

run()
