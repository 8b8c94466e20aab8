"""How thirteen real families write a turn of the assistant."""

import dataclasses

# Not the text of any project: templates of Llama 2's kind, and one that can write every row.
LLAMA2 = (
    "{{ bos_token }}{% set ns = namespace(lead='', turn=0) %}{% for m in messages %}"
    "{% if m['role'] == 'system' and loop.first %}"
    "{% set ns.lead = '<<SYS>>\\n' + m['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% elif (m['role'] == 'user') != (ns.turn % 2 == 0) or m['role'] not in ['user', 'assistant']"
    " %}{{ raise_exception('roles must alternate: user, assistant') }}"
    "{% elif m['role'] == 'user' %}{% if ns.turn %}{{ bos_token }}{% endif %}"
    "{{ '[INST] ' + ns.lead + m['content'] | trim + ' [/INST]' }}{% set ns.lead = '' %}"
    "{% set ns.turn = ns.turn + 1 %}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% set ns.turn = ns.turn + 1 %}{% endif %}{% endfor %}"
)


ANY = (
    "{% if tools %}{{ tools | tojson + '\\n' }}{% endif %}"
    "{% for m in messages %}{{ '[' + m['role'] + ']\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{% if m['reasoning_content'] %}{{ '(' + m['reasoning_content'] + ')' }}"
    "{% endif %}{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] + ' ' + c['function']['arguments'] | tojson }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)


LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>")


MISTRAL_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]")


R1_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")


GPT_OSS_TOKENS = ("<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>")


PHI_TOKENS = ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")


HERMES = '<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>'


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family writes a turn of the assistant, and what its tokenizer is.

    Attributes:
        template: A file of `.assets`; else the tokenizer's own.
        tokenizer: A folder of `.assets`; else the tokenizer of bytes, with `tokens`, is used.
        stop: What ends a turn.
        answer: An answer in words, with `stop` behind it.
        thought: The same with reasoning_content, if that is read.
        call: A call, with its stop token, if the template has calls.
        both: A call with words before it, if it writes them.
        thought_call: A call with reasoning_content.
        cut: What the prompt has at its end that no finished turn has.
        markers: What opens a user's and an assistant's turn.
        inner: What ends a turn that is not the last one, and an answer there, in a whole
            conversation.
        names: End of sequence and beginning of sequence, for the tokenizer of bytes.
    """

    stop: str
    template: str | None = None
    tokenizer: str | None = None
    answer: str = "{}"
    thought: str | None = None
    call: str | None = None
    both: str | None = None
    thought_call: str | None = None
    cut: str = ""
    markers: tuple[str, str] = ("", "")
    inner: str = ""
    tokens: tuple[str, ...] = ()
    names: tuple[str, str | None] = ("</s>", "<s>")


HEADERS = tuple(f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))


CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")


FAMILIES = {
    # The template puts a space before the answer and another before the stop token.
    "llama2": Family("</s>", tokenizer="llama2", answer=" {} "),
    # It opens the assistant's next turn, whether asked or not.
    "llama3": Family("<|eot_id|>", tokenizer="llama3", markers=HEADERS),
    "llama3_1": Family(
        "<|eot_id|>",
        "trl/llama3_1.jinja",
        "llama3_1",
        call='{{"name": "weather", "parameters": {}}}',
        markers=HEADERS,
    ),
    "qwen2_5": Family(
        "<|im_end|>",
        "trl/qwen2_5.jinja",
        "qwen3",
        call=HERMES,
        both="{words}\n" + HERMES,
        markers=CHATML,
    ),
    # The last turn has a thought, an empty one where there is none: a model that is told not to
    # think is shown the same.
    "qwen3": Family(
        "<|im_end|>",
        tokenizer="qwen3",
        answer="<think>\n\n</think>\n\n{}",
        thought="<think>\n{thought}\n</think>\n\n{words}",
        call="<think>\n\n</think>\n\n" + HERMES,
        both="<think>\n\n</think>\n\n{words}\n" + HERMES,
        thought_call="<think>\n{thought}\n</think>\n\n" + HERMES,
        markers=CHATML,
        inner="{}<|im_end|>",
    ),
    # A space before the answer. The instructions stand before the last question alone.
    "mistral_v3": Family(
        "</s>",
        "axolotl/mistral_v2v3.jinja",
        answer=" {}",
        call='[TOOL_CALLS] [{{"name": "weather", "arguments": {}, "id": "call00001"}}]',
        tokens=MISTRAL_TOKENS,
    ),
    "mistral_nemo": Family(
        "</s>",
        "axolotl/mistral_v3_tekken.jinja",
        call='[TOOL_CALLS][{{"name": "weather", "arguments": {}, "id": "call00001"}}]',
        tokens=MISTRAL_TOKENS,
    ),
    "gemma3": Family("<end_of_turn>", tokenizer="gemma3"),
    # EOS ends the conversation, not the turn.
    "phi3": Family(
        "<|end|>",
        "trl/phi3.jinja",
        tokens=PHI_TOKENS,
        names=("<|endoftext|>", "<s>"),
        markers=("<|user|>\n", "<|assistant|>\n"),
    ),
    # With {% generation %}.
    "phi4": Family(
        "<|im_end|>", "axolotl/phi_4.jinja", tokens=CHATML_TOKENS, names=("<|im_end|>", None)
    ),
    # Thoughts are cut off, and the prompt opens one.
    "r1": Family(
        "<｜end▁of▁sentence｜>",
        "trl/deepseek_r1_distill.jinja",
        cut="<think>\n",
        tokens=R1_TOKENS,
        names=(R1_TOKENS[1], R1_TOKENS[0]),
        markers=("<｜User｜>", "<｜Assistant｜>"),
    ),
    # The model writes the channel; a turn that is not the last one ends otherwise.
    "gpt_oss": Family(
        "<|return|>",
        "trl/gptoss.jinja",
        answer="<|channel|>final<|message|>{}",
        thought="<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
        "<|channel|>final<|message|>{words}",
        call=" to=functions.weather<|channel|>commentary json<|message|>{}<|call|>",
        both="<|channel|>analysis<|message|>{words}<|end|><|start|>assistant"
        " to=functions.weather<|channel|>commentary json<|message|>{}<|call|>",
        thought_call="<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
        " to=functions.weather<|channel|>commentary json<|message|>{}<|call|>",
        tokens=GPT_OSS_TOKENS,
        names=("<|return|>", None),
        markers=("<|start|>user<|message|>", "<|start|>assistant"),
        inner="<|channel|>final<|message|>{}<|end|>",
    ),
    "smollm2": Family("<|im_end|>", tokenizer="smollm2", markers=CHATML),
}
