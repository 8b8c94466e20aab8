"""The model card that goes with every export."""

from pathlib import Path

from lorax.config.run import RunConfig, dump_config


def write_card(
    config: RunConfig, format: str, facts: dict[str, str], *, rows: int | None = None
) -> str:
    """Returns the README.md of an export: what it is, how it was made, how to load it.

    Args:
        config: The run. Of the data, the card has the names of the sources alone.
        format: ``peft``, ``peft-portable``, ``merged`` or ``rebased``.
        facts: Results to list, by name.
        rows: Rows that the base's embedding must be given before the adapter is loaded; None if it
            has them.
    """
    base = config.model.name_or_path
    is_adapter = format.startswith("peft")
    library, tags = ("peft", "[lora, lorax]") if is_adapter else ("transformers", "[lorax]")
    title = "LoRA adapter" if is_adapter else "Fine-tuned model"
    results = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    resize = "" if rows is None else _RESIZE.format(rows)
    load = _LOAD_ADAPTER if is_adapter else _LOAD_REBASED if format == "rebased" else _LOAD_MODEL
    if is_adapter and (kind := config.model.quantization).startswith("nf4"):
        double = kind == "nf4_double"
        load = _LOAD_ON_NF4.replace("{double}", str(double)).replace("{dtype}", config.model.dtype)
    revision = config.model.revision
    source = f'"{base}"' if revision is None else f'"{base}", revision="{revision}"'
    return (
        f"---\nlibrary_name: {library}\nbase_model: {base}\ntags: {tags}\n---\n\n"
        f"# {title} for {base}\n\n"
        f"Made with lorax, a LoRA fine-tuning library in JAX. Format: `{format}`.\n\n"
        f"## Results\n\n{results or '- none measured'}\n\n"
        f"## Use\n\n```python\n{load.format(base=source, resize=resize)}```\n\n"
        f"## Settings\n\n```yaml\n{dump_config(config)}```\n"
    )


_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
{resize}model = PeftModel.from_pretrained(model, "path/to/this/folder")
# It was trained on the token ids of the base's tokenizer.json. Where AutoTokenizer gives others,
# as for Llama 2 in transformers 5, PreTrainedTokenizerFast takes that file as it is.
"""

_LOAD_ON_NF4 = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

# It was trained on the base in NF4. The base in 16 bits gives other answers.
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant={double},
    bnb_4bit_compute_dtype="{dtype}",
)
model = AutoModelForCausalLM.from_pretrained({base}, quantization_config=nf4)
{resize}model = PeftModel.from_pretrained(model, "path/to/this/folder")
# It was trained on the token ids of the base's tokenizer.json. Where AutoTokenizer gives others,
# as for Llama 2 in transformers 5, PreTrainedTokenizerFast takes that file as it is.
"""

_RESIZE = """\
model.resize_token_embeddings({})  # for the new tokens of this folder's tokenizer
"""

_LOAD_REBASED = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

# The weights in this folder are the base's without what the adapter began with.
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
model = PeftModel.from_pretrained(model, "path/to/this/folder/adapter")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
# It was trained on the token ids of tokenizer.json. Where AutoTokenizer gives others, as for
# Llama 2 in transformers 5, PreTrainedTokenizerFast takes that file as it is.
"""

_LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
# It was trained on the token ids of tokenizer.json. Where AutoTokenizer gives others, as for
# Llama 2 in transformers 5, PreTrainedTokenizerFast takes that file as it is.
"""


def title_of(config: RunConfig) -> str:
    """Returns what a run trains, in a line."""
    base = "/".join(Path(config.model.name_or_path).parts[-2:])
    method = "full fine-tuning" if config.train.method == "full" else "LoRA"
    return f"{method} of {base}"
