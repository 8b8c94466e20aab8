"""Sliding windows of layers, read from and written to a config.json."""

from typing import Any

from lorax.system.json_fields import JsonFields

FULL = "full_attention"
SLIDING = "sliding_attention"


def read_windows(fields: JsonFields, kind: str, layers: int) -> tuple[int | None, tuple[str, ...]]:
    """Returns the window and the type of every layer, by the rules of the model's own class.

    Args:
        fields: The fields of config.json.
        kind: Windows of the class: ``none``, ``every`` layer alike, or ``layers`` by their types.
        layers: Number of layers.
    """
    model_type = fields.raw("model_type", None)
    if kind == "none":
        _read_switched_off_window(fields, model_type)
        return _alike(fields, None, layers)
    # Absent and null differ: an absent window is the class's default of 4096.
    default = 4096 if "sliding_window" not in fields.values else None
    window = fields.integer("sliding_window", default)
    if kind == "every":
        slides = (window is not None,)
        reason = f"sliding_window alone decides for {model_type}"
        fields.only("use_sliding_window", slides, reason)
        return _alike(fields, window, layers)
    if not fields.boolean("use_sliding_window", False):
        window = None
    first = fields.integer("max_window_layers", 28, minimum=0)
    types = fields.raw("layer_types", None)
    if types is None:
        types = [SLIDING if window and i >= first else FULL for i in range(layers)]
    known = isinstance(types, list) and all(each in (FULL, SLIDING) for each in types)
    if not known or len(types) != layers:
        raise fields.error("layer_types", f"must be {layers} times {FULL!r} or {SLIDING!r}")
    if SLIDING in types and window is None:
        raise fields.error("layer_types", "needs use_sliding_window: true and a sliding_window")
    return (window if SLIDING in types else None), tuple(types)


def _read_switched_off_window(fields: JsonFields, model_type: Any) -> None:
    """Reads the window fields of a model derived from a family without windows."""
    fields.only("use_sliding_window", (False,), f"a {model_type} model has no windows")
    if fields.raw("use_sliding_window", None) is False:
        fields.ignore(("sliding_window", "max_window_layers"))


def _alike(
    fields: JsonFields, window: int | None, layers: int
) -> tuple[int | None, tuple[str, ...]]:
    """Returns the types of layers that are all alike; the file may name the same."""
    types = (SLIDING if window else FULL,) * layers
    if fields.values.get("layer_types") == list(types):
        fields.ignore(("layer_types",))
    return window, types


def write_windows(window: int | None, layer_types: tuple[str, ...], kind: str) -> dict[str, Any]:
    """Returns the fields of config.json that `read_windows` reads back."""
    if kind == "none":
        return {}
    result: dict[str, Any] = {"sliding_window": window}
    if kind == "every":
        return result
    types = list(layer_types)
    first = types.index(SLIDING) if SLIDING in types else len(types)
    result |= {"use_sliding_window": window is not None, "layer_types": types}
    # Older transformers know only "full below this layer"; other patterns need layer_types.
    if FULL not in types[first:]:
        result["max_window_layers"] = first
    return result
