"""Sound rows in a conversation, and loading them from a file."""

from lorax.config.data import DataConfig, DataSource
from lorax.data.encode import load_encoded_dataset

CHAT = (
    "{% for m in messages %}{{ m['role'] + ('@' + m['name'] if 'name' in m else '') + ':' }}"
    "{{ m['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def _load(path, tokenizer, split="train", **settings):
    config = DataConfig(train=(DataSource(path=str(path), split=split),), **settings)
    return load_encoded_dataset(config.train, config, tokenizer)
