"""The tables, embeddings and heads, of which single tokens train."""

from collections.abc import Mapping

from flax import nnx

from lorax.adapters.sites import shape_of
from lorax.adapters.targets import TargetError, nearest
from lorax.config.adapter import LoraConfig
from lorax.system.wording import show

_SETTING = "lora.trainable_token_indices"


def tables_of(
    modules: Mapping[str, nnx.Module],
    tied: Mapping[str, str],
    config: LoraConfig,
    adapted: list[str],
) -> dict[str, tuple[int, ...]]:
    """Returns the tokens that train by the full name of their table.

    A list of tokens is of the model's embedding; a name takes the modules that it ends. A head
    that is tied to the embedding follows it.

    Args:
        modules: The model's, by full name.
        tied: Names that share another module's weight; see `tied_modules`.
        config: The settings.
        adapted: Names of the modules that carry an adapter.

    Raises:
        TargetError: If there is no such table, it trains otherwise too, or tied tables are given
            different tokens.
    """
    given = config.trainable_token_indices
    if given is None:
        return {}
    embeddings = [name for name, module in modules.items() if isinstance(module, nnx.Embed)]
    if not isinstance(given, Mapping):
        given = {_one_embedding(embeddings): given}
    found: dict[str, tuple[int, ...]] = {}
    for entry, ids in given.items():
        if repeated := sorted({token for token in ids if ids.count(token) > 1}):
            raise TargetError(f"{_SETTING}: {show(entry)} has token {repeated[0]} more than once")
        names = [n for n in (*modules, *tied) if n == entry or n.endswith(f".{entry}")]
        tables = [tied.get(name, name) for name in names]
        if not names or any(shape_of(modules[name]) is None for name in tables):
            raise TargetError(
                f"{_SETTING}: {show(entry)} names no embedding and no head; "
                f"{nearest(entry, [*embeddings, *tied])}"
            )
        for name in tables:
            if sorted(found.setdefault(name, ids)) != sorted(ids):
                raise TargetError(
                    f"{_SETTING}: {name} and what is tied to it share one matrix, so they need the "
                    "same tokens"
                )
    _refuse_trained_otherwise(found, adapted, config)
    return found


def _one_embedding(embeddings: list[str]) -> str:
    named = [name for name in embeddings if name.split(".")[-1] == "embed_tokens"]
    if len(only := named or embeddings) != 1:
        listed = ", ".join(embeddings) or "none"
        raise TargetError(
            f"{_SETTING}: a list of tokens is of the model's one embedding, and it has {listed}; "
            "write a map of module name to tokens"
        )
    return only[0]


def _refuse_trained_otherwise(
    tables: Mapping[str, tuple[int, ...]], adapted: list[str], config: LoraConfig
) -> None:
    for name in tables:
        if name in adapted:
            raise TargetError(
                f"{_SETTING}: {name} carries an adapter of target_modules too; leave out the one "
                "or the other"
            )
        if any(name.endswith(entry) for entry in config.modules_to_save or ()):
            raise TargetError(
                f"{_SETTING}: modules_to_save trains {name} whole; leave out the one or the other"
            )
