"""How a run ends before its time: asked to by a signal, or stuck."""


class OutOfMemoryError(RuntimeError):
    """A step that did not fit the device, with what would."""
