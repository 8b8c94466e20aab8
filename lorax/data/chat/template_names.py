"""The variables that a chat template reads."""

import functools
import re

import jinja2
import jinja2.meta

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_MARKS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


@functools.lru_cache(maxsize=8)
def read_variables(template: str) -> frozenset[str]:
    """Returns the variables that a template does not set itself; none if it cannot be parsed."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(_MARKS.sub("", template))
    except jinja2.TemplateSyntaxError:
        return frozenset()
    return frozenset(jinja2.meta.find_undeclared_variables(parsed))
