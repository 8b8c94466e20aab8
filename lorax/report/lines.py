"""Lines of text, printed as they are whatever they hold."""

import textwrap

from rich.console import Console
from rich.text import Text


def print_line(console: Console, text: str, style: str = "") -> None:
    """Prints a text as it is: brackets stay, and nothing of it is cut.

    On a terminal it is broken between words; a path that is longer than the terminal is wide is
    left to the terminal, so that it can be copied. In a log it is one line.

    Args:
        console: Where to.
        text: May name paths and hold words of the user; none of it is read as markup.
        style: Of the whole text, such as `yellow`.
    """
    if console.is_terminal:
        text = "\n".join(_wrap(line, console.width) for line in text.split("\n"))
    console.print(Text(text, style), soft_wrap=True, highlight=False)


def _wrap(line: str, width: int) -> str:
    wrapper = textwrap.TextWrapper(
        width,
        expand_tabs=False,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.fill(line)
