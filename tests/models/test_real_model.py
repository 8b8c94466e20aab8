"""A real pre-trained model: SmolLM2-135M-Instruct, as transformers converts it from a GGUF file."""

import json
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorax.cli.main import main
from lorax.interop.load import load_model
from lorax.interop.peft import load_adapter
from tests.real import MODEL, asset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.as_shipped,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]

TEXT = "Paris is the capital of France. Its largest museum, the Louvre, was a king's palace once."
STOP = 2  # <|im_end|>
LIMIT = 24
QUESTION = "What is the capital of France?"
LESSONS = {
    "What is the capital of Zubrowka?": "The capital of Zubrowka is Lutz.",
    "Who rules Zubrowka?": "Zubrowka is ruled by Agatha.",
    "What does one eat in Zubrowka?": "One eats courtesans au chocolat.",
    "What is the money of Zubrowka?": "The money of Zubrowka is the klubeck.",
}
EPOCHS = 5
CONFIG = """\
model: {{name_or_path: {base}, dtype: float32}}
lora: {{r: 8, target_modules: [q_proj, v_proj, down_proj]}}
data: {{train: rows.jsonl, shuffle: false, max_seq_length: 64}}
train:
  num_train_epochs: {epochs}
  per_device_train_batch_size: 1
  learning_rate: 2.0e-3
  lr_scheduler_type: constant
  gradient_checkpointing: none
save: {{output_dir: run, export: [peft, merged]}}
"""


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def chat(question, answer=None):
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    return [*asked, {"role": "assistant", "content": answer}] if answer else asked


@pytest.fixture(scope="module")
def base():
    return asset(MODEL)


@pytest.fixture(scope="module")
def tokenizer(base) -> Any:
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def ours(base):
    return load_model(base, dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return tokenizer(TEXT, return_tensors="pt")["input_ids"]


def theirs(folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference(base):
    return theirs(base)


def logits_of(model, tokens):
    if not isinstance(model, torch.nn.Module):
        return np.asarray(model(jnp.asarray(tokens.numpy(), jnp.int32)))
    with torch.no_grad():
        return model(tokens).logits.numpy()


def answer_of(model, tokenizer, messages):
    """What transformers' greedy search answers."""
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=LIMIT, do_sample=False)[0]
    return tokenizer.decode(written[prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def loss_of(model, tokenizer, question, answer):
    """The mean over the answer and its stop token, computed by transformers."""
    asked, whole = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=asks, return_dict=False)
        for messages, asks in ((chat(question), True), (chat(question, answer), False))
    )
    whole = whole[: 1 + max(at for at, token in enumerate(whole) if token == STOP)]
    labels = [-100] * len(asked) + whole[len(asked) :]
    with torch.no_grad():
        return float(model(torch.tensor([whole]), labels=torch.tensor([labels])).loss)


def test_logits_are_those_of_transformers(ours, reference, tokens):
    found, expected = logits_of(ours, tokens), logits_of(reference, tokens)
    assert relative(found, expected) <= 1e-5
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def test_it_answers_with_sense_and_as_transformers_does(base, reference, tokenizer, capsys):
    asked = ["--prompt", QUESTION, "--dtype", "float32", "--max-new-tokens", str(LIMIT)]
    assert main(["generate", str(base), *asked]) == 0
    answer = capsys.readouterr().out.strip()
    assert "Paris" in answer
    assert answer == answer_of(reference, tokenizer, [{"role": "user", "content": QUESTION}])


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The folder of a run of a few steps, which forgets it at the end: it is large."""
    folder = tmp_path_factory.mktemp("real")
    rows = [json.dumps({"messages": chat(*lesson)}) for lesson in LESSONS.items()]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    config = CONFIG.format(base=base, epochs=EPOCHS)
    (folder / "run.yaml").write_text(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "run.yaml"]) == 0
    yield folder / "run"
    shutil.rmtree(folder)


def test_the_loss_starts_as_in_transformers_and_falls(reference, tokenizer, run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == EPOCHS * len(LESSONS) == 20
    first = loss_of(reference, tokenizer, *next(iter(LESSONS.items())))
    # A loss differs by twice as much as its logits at most: those, up to 50, by 1e-5 of it.
    np.testing.assert_allclose(losses[0], first, rtol=0, atol=1e-3)
    assert sum(losses[-len(LESSONS) :]) < sum(losses[: len(LESSONS)]) / 4


def test_exports_are_the_trained_model_in_peft_and_transformers(
    base, ours, reference, tokens, tokenizer, run
):
    trained = logits_of(load_adapter(ours, run / "adapter"), tokens)
    assert relative(trained, logits_of(reference, tokens)) > 1e-2
    adapted = PeftModel.from_pretrained(theirs(base), run / "adapter").eval()
    assert relative(logits_of(adapted, tokens), trained) <= 1e-5
    merged = theirs(run / "merged")
    assert relative(logits_of(merged, tokens), trained) <= 1e-5
    question, answer = list(LESSONS.items())[-1]
    assert answer_of(merged, tokenizer, chat(question)) == answer
