"""Walks over a model's modules: names, ties, what trains."""

from flax import nnx

from lorax.layers.carrier import Carrier


def tied_modules(model: nnx.Module) -> dict[str, str]:
    """Returns the names that the checkpoint format knows for modules that share another's weight.

    With tied embeddings that is ``{"lm_head": "model.embed_tokens"}``: there is one matrix, so
    training it whole under either name trains both uses.
    """
    return getattr(model, "tied_modules", {})


def named_modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Returns every module of the tree under its dotted name, layers in numeric order.

    A module held in several places has the name that sorts first: NNX keeps no other order. What
    is attached to a layer is no module of the model.
    """
    names: dict[str, nnx.Module] = {}
    seen = {id(model)}

    def visit(parent: nnx.Module, prefix: str) -> None:
        def numeric(item):
            return (not item[0].isdigit(), item[0].zfill(9))

        for key, child in sorted(vars(parent).items(), key=numeric):
            if isinstance(child, nnx.Module) and id(child) not in seen:
                seen.add(id(child))
                names[prefix + key] = child
                if not isinstance(child, Carrier):
                    visit(child, f"{prefix}{key}.")

    visit(model, "")
    return names


def layers_with_adapters(model: nnx.Module) -> dict[str, Carrier]:
    """Returns the layers that have adapters, active or not, under their dotted names."""
    return {n: m for n, m in named_modules(model).items() if isinstance(m, Carrier) and m.attached}


def adapted_layers(model: nnx.Module) -> dict[str, Carrier]:
    """Returns the layers that have an active adapter, under their dotted names."""
    layers = layers_with_adapters(model)
    return {name: layer for name, layer in layers.items() if layer.active is not None}


def split_trainable(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Splits `model` into (structure, what trains, the rest); `nnx.merge` puts them together."""
    graph, trainable, rest = nnx.split(model, nnx.Param, ...)
    return graph, trainable, rest


def module_references(root: nnx.Module) -> dict[int, list[tuple[nnx.Module, str]]]:
    """Maps each module's id to every (parent, attribute) that holds it."""
    references: dict[int, list[tuple[nnx.Module, str]]] = {}
    for parent in (root, *named_modules(root).values()):
        for key, child in vars(parent).items():
            if isinstance(child, nnx.Module):
                references.setdefault(id(child), []).append((parent, key))
    return references


def set_child(parent: nnx.Module, key: str, child: nnx.Module | nnx.Variable) -> None:
    """Puts `child` where `parent` holds the attribute or list entry `key`."""
    if isinstance(parent, nnx.List):
        parent[int(key)] = child
    else:
        setattr(parent, key, child)
