"""Chat templates of several kinds and a tokenizer of bytes, for the tests of the data."""

import json

import tokenizers
import transformers

from lorax.config.data import DataConfig, DataSource
from lorax.data.encode import load_encoded_dataset
from lorax.data.preview import render_example

HEADER = "{{ '<|im_start|>' + m['role'] + '\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = (
    "{% for m in messages %}" + HEADER + "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}" + PROMPT
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\\n\\n' }}"
    "{{ m['content'] | trim }}{{ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}"
    + HEADER
    + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}" + PROMPT
)
STOP_OUTSIDE = GENERATION.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}",
)
DROPS_THINKING = (
    "{% for m in messages %}"
    + HEADER
    + "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
)
NO_STOP = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>")
MARKERS = {
    "instruction_part": "<|im_start|>user\n",
    "response_part": "<|im_start|>assistant\n",
}
TWO_TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


def byte_tokenizer(template=None, *, trim_offsets=False, **named):
    """A tokenizer with one token per byte, plus the special tokens; adds ``<s>`` to a text."""
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({s: i for i, s in enumerate(symbols)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    begin = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.post_processor = tokenizers.processors.Sequence(
        [tokenizers.processors.ByteLevel(trim_offsets=trim_offsets), begin]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", **named}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def encode_rows(folder, template, *rows, **settings):
    """The dataset that rows become under a template and settings of `data`."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=(DataSource(path=str(path)),), **settings)
    return load_encoded_dataset(config.train, config, byte_tokenizer(template))


def pieces(encoded, template=CHATML):
    """Of each row the texts that it consists of, and whether they are learned."""
    tokenizer = byte_tokenizer(template)
    return [render_example(encoded, i, tokenizer) for i in range(len(encoded))]


def learned(encoded, template=CHATML):
    """Of each row the texts that are learned."""
    return [[text for text, flag in row if flag] for row in pieces(encoded, template)]


def changes(encoded):
    """What became of rows, with their number."""
    return {change.what: change.rows for change in encoded.report.changes}
