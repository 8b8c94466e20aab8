"""The rows that several tests of the data encode."""

from tests.chats import (
    PROMPT,
    TWO_TURNS,
)

TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + (m['content'] or '') }}"
    "{% for c in m['tool_calls'] or [] %}{% set f = c['function'] if 'function' in c else c %}"
    '{"name": "{{ f[\'name\'] }}", "arguments": {{ f[\'arguments\'] | tojson }}}{% endfor %}'
    "{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
)


ALWAYS_PROMPTS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\\n\\n' }}"
    "{{ m['content'] | trim + '<|eot|>' }}{% endfor %}{{ '<|start|>assistant<|end|>\\n\\n' }}"
)


USER, ANSWER = TWO_TURNS[0], TWO_TURNS[1]


def chat(*messages, **columns):
    return {"messages": list(messages), **columns}


def call(arguments, **more):
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a1", "type": "function", "function": function}],
        **more,
    }
