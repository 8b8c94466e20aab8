"""Arguments of public functions: the kind that a value must have."""

from typing import Any

from lorax.system.wording import show


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], needed: str) -> None:
    """Refuses an argument of another kind.

    Args:
        name: The argument's.
        value: What was given.
        kinds: What it may be.
        needed: The same in words, such as "a lorax.RunConfig, as load_config returns".

    Raises:
        TypeError: Naming the argument, what is needed and what came.
    """
    if not isinstance(value, kinds):
        plain = isinstance(value, str | int | float | None)
        found = show(value) if plain else type(value).__name__
        raise TypeError(f"{name} must be {needed}, got {found}")
