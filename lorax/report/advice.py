"""Advice where a run learned little, and where its tokenizer does not know the text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorax.adapters.targets import is_all_linear
from lorax.config.run import RunConfig
from lorax.data.chat.tokenizer import Tokenizer, named_token_id
from lorax.data.dataset import EncodedDataset
from lorax.models.architecture import DecoderConfig
from lorax.report.log import METRICS_FILE, read_metrics

FEWEST_STEPS = 20
"""Shorter runs get no advice."""

_FEWEST_LINES = 5
"""Logged steps that are compared, the last fifth with the first."""

FALLEN = 0.97
"""A loss has fallen if it is at most this share of its first value."""

_CLEARLY = 0.9
"""As `FALLEN`, of training losses, which differ from batch to batch."""

LOWEST = 0.1
"""Nats per token: a run that starts below has little to learn."""

HIGHEST_RATE = 1e-3
"""Above this learning rate, a higher one is not advised."""

MOST_BYTES = 0.05
"""Share of tokens that may be parts of a character: emoji and names in another script."""


def advise(config: RunConfig, run: Path, architecture: DecoderConfig) -> tuple[str, ...]:
    """Returns what to try where the losses of a run that ended did not fall; empty where they did.

    The held-out loss is compared with the one before the first step, the training loss of the last
    fifth of the steps with that of the first. A base model that did worse than guessing is reported
    too, unless all was learned in the end.

    Args:
        config: The run's settings.
        run: Its folder, whose `metrics.jsonl` is read if there is one.
        architecture: Of the base model.
    """
    try:
        records = read_metrics(run / METRICS_FILE)
    except ValueError:  # it is not there or was damaged: the run itself has ended well
        return ()
    train = _numbers(records, "loss")
    held_out = _numbers(records, "eval_loss")
    is_short = len(train) < _FEWEST_LINES or records[-1]["step"] < FEWEST_STEPS
    if is_short or min([train[0], *held_out[:1]]) < LOWEST:
        return ()
    fifth = len(train) // 5
    first = math.fsum(train[:fifth]) / fifth
    last = math.fsum(train[-fifth:]) / fifth
    start, end = (held_out[0], held_out[-1]) if held_out else (first, last)
    guessing = math.log(architecture.vocab_size)
    if start > guessing and end > LOWEST and (whole := _train_whole(config, architecture)):
        return (
            f"before training the loss was {start:.2f}, and guessing among all "
            f"{architecture.vocab_size:,} tokens gives {guessing:.2f}: the base model hardly knows "
            f"the tokens of these answers. Try {whole}, which trains such modules whole",
        )
    if len(held_out) > 1:
        if min(held_out[1:]) <= FALLEN * start:
            return ()
        what = f"the held-out loss did not fall ({start:.4f} → {end:.4f})"
        if last <= FALLEN * first:
            return (
                f"{what}, the training loss did ({first:.4f} → {last:.4f}): the rows were learned "
                "by heart, or the held-out rows are of another kind. Try more rows or fewer epochs",
            )
    elif last > FALLEN * first:
        what = f"the training loss did not fall ({first:.4f} → {last:.4f})"
    else:
        return ()
    worse = end > start / FALLEN if len(held_out) > 1 else last > first / _CLEARLY
    if worse:
        return (f"{what}, and training made it worse: try {_rate(config, 1 / 3)}",)
    return (f"{what}. Try, one by one: {'; '.join(list_remedies(config, architecture))}",)


def list_remedies(config: RunConfig, architecture: DecoderConfig) -> Iterator[str]:
    """Yields settings with which a run may learn more, as the command line takes them."""
    train = config.train
    if train.learning_rate < HIGHEST_RATE:
        yield _rate(config, 3)
    elif train.max_steps > 0:
        yield f"train.max_steps={3 * train.max_steps}"
    else:
        yield f"train.num_train_epochs={3 * train.num_train_epochs:g}"
    reads_lora = train.method == "lora" and config.model.adapter is None
    all_linear = is_all_linear(config.lora) or config.lora.layers_to_transform is not None
    if reads_lora and not all_linear:
        yield "lora.target_modules=all-linear"
    if whole := _train_whole(config, architecture):
        yield f"{whole}, which trains such modules whole: for tokens new to the base model"


def _train_whole(config: RunConfig, architecture: DecoderConfig) -> str | None:
    """Returns the settings that train embedding and head whole, and undo what forbids it.

    None where they would not be read, or some modules are trained whole already.
    """
    lora = config.lora
    if config.train.method != "lora" or config.model.adapter is not None or lora.modules_to_save:
        return None
    names = "embed_tokens" if architecture.tie_word_embeddings else "embed_tokens,lm_head"
    settings = [f"lora.modules_to_save=[{names}]"]
    if config.model.offload_embedding:
        settings.append("model.offload_embedding=false")
    exports = [format for format in config.save.export if format != "peft-portable"]
    if len(exports) < len(config.save.export):
        settings.append(f"save.export=[{','.join(exports) or 'peft'}]")
    return " ".join(settings)


def _rate(config: RunConfig, factor: float) -> str:
    return f"train.learning_rate={factor * config.train.learning_rate:.1e}"


def _numbers(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Returns the values of a metric, in order, where they were finite."""
    return [record[name] for record in records if record.get(name) is not None]


def tokenizer_notes(datasets: Mapping[str, EncodedDataset], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields what of the data the tokenizer does not know, or knows in single bytes only.

    Args:
        datasets: By what they are for.
        tokenizer: What encoded them.
    """
    unknown = named_token_id(tokenizer, "unk")
    for name, data in datasets.items():
        ids, counts = np.unique(data.tokens, return_counts=True)
        total = int(counts.sum())
        lost = int(counts[ids == unknown].sum()) if unknown is not None else 0
        if lost and unknown != named_token_id(tokenizer, "eos"):
            yield (
                f"{name}: {lost:,} of {total:,} tokens are {tokenizer.unk_token}: the tokenizer "
                "has no token for what stands there, and it is not learned"
            )
        partial = [_is_partial(tokenizer, token) for token in ids.tolist()]
        parts = int(counts[np.array(partial, np.bool_)].sum())
        if parts > MOST_BYTES * total:
            yield (
                f"{name}: {parts / total:.0%} of the tokens are single bytes of characters that "
                "the tokenizer does not know: such text is slow to learn; a base model whose "
                "tokenizer knows the script learns it sooner"
            )


def _is_partial(tokenizer: Tokenizer, token: int) -> bool:
    """Says whether a token is a part of a character: ``<0xE5>``, or bytes that are not UTF-8."""
    text = str(tokenizer.convert_ids_to_tokens(token))
    if text.startswith("<0x") and text.endswith(">"):
        return True
    return "\N{REPLACEMENT CHARACTER}" in str(tokenizer.decode([token]))
