"""Names and layouts of an adapter's parameters in PEFT's files, by the kind of layer.

For a linear layer ``lora_A.weight`` is (r, k) and ``lora_B.weight`` (n, r). An embedding has
``lora_embedding_A`` and ``lora_embedding_B``, and a convolution keeps the axes of its kernel:
(r, inputs, *window), (n, r, 1, …) and, for DoRA's magnitude, (1, n, 1, …). What stacks layers comes
before these axes; PEFT has no such layers.

Source: the behaviour of PEFT 0.21 (`peft.tuners.lora.layer`).
"""

import numpy as np

from lorax.adapters.method import Parameter, Shape, Spec, shapes_of
from lorax.layers.maps import Convolution, Map

PREFIX = "base_model.model."
"""What PEFT's files put before the name of a module."""

_OF_EMBEDDINGS = {
    "lora_A.weight": "lora_embedding_A",
    "lora_B.weight": "lora_embedding_B",
}


def file_key(linear_map: Map, parameter: Parameter) -> str:
    """Returns the end of a parameter's key in PEFT's files."""
    if linear_map.kind == "lookup":
        return _OF_EMBEDDINGS.get(parameter.suffix, parameter.suffix)
    return parameter.suffix


def to_file(linear_map: Map, parameter: Parameter, value: np.ndarray) -> np.ndarray:
    """Returns a parameter as PEFT's files hold it."""
    lead = value.ndim - len(parameter.axes)
    if not isinstance(linear_map, Convolution):
        stored = np.swapaxes(value, -1, -2) if len(parameter.axes) == 2 else value
        return np.ascontiguousarray(stored)
    ones = (1,) * len(linear_map.window)
    stack = value.shape[:lead]
    match parameter.axes:
        case "kr":
            shape = (*stack, *linear_map.window, linear_map.inputs, value.shape[-1])
            places = range(lead, lead + len(ones))
            order = (*range(lead), len(shape) - 1, len(shape) - 2, *places)
            value = value.reshape(shape).transpose(order)
        case "rn":
            value = np.swapaxes(value, -1, -2).reshape(*stack, *value.shape[:-3:-1], *ones)
        case "n":
            # A bias is a vector; a magnitude has the axes of the kernel.
            if not parameter.suffix.endswith("bias"):
                value = value.reshape(*stack, 1, value.shape[-1], *ones)
    return np.ascontiguousarray(value)


def from_file(linear_map: Map, parameter: Parameter, stored: np.ndarray) -> np.ndarray:
    """Returns the parameter of what `to_file` returned."""
    if not isinstance(linear_map, Convolution):
        return np.swapaxes(stored, -1, -2) if len(parameter.axes) == 2 else stored
    count = len(linear_map.window)
    match parameter.axes:
        case "kr":
            lead = stored.ndim - count - 2
            order = (*range(lead), *range(lead + 2, stored.ndim), lead + 1, lead)
            value = stored.transpose(order)
            return value.reshape(*value.shape[:lead], -1, value.shape[-1])
        case "rn":
            return np.swapaxes(stored.reshape(stored.shape[:-count]), -1, -2)
        case _:
            if parameter.suffix.endswith("bias"):
                return stored
            value = stored.reshape(stored.shape[:-count])
            return value[..., 0, :]


def file_shape(
    linear_map: Map, parameter: Parameter, name: str, spec: Spec, stack: tuple[int, ...]
) -> tuple[int, ...]:
    """Returns the shape of a parameter in PEFT's files.

    Args:
        linear_map: The layer's.
        parameter: Of the adapter's method.
        name: The parameter's.
        spec: The adapter.
        stack: Axes of stacked layers.
    """
    shape = (*stack, *shapes_of(spec, Shape(*linear_map.shape))[name])
    empty = np.broadcast_to(np.zeros((), np.bool_), shape)  # takes no memory
    return to_file(linear_map, parameter, empty).shape


def kernel_to_file(kernel: np.ndarray) -> np.ndarray:
    """Returns a kernel that is trained whole, (*window, k, n), as torch has it: (n, k, *window)."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def kernel_from_file(weight: np.ndarray) -> np.ndarray:
    """Returns the kernel of what `kernel_to_file` returned."""
    return np.moveaxis(weight, (0, 1), (-1, -2))
