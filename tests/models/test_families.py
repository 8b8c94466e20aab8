"""Every family of models keeps the contract; what is known of one stands in its file alone."""

import ast
import dataclasses
import io
import re
import tokenize
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import lorax
from lorax.interop.load import load_model
from lorax.models.families import FAMILIES, read_architecture
from lorax.models.family import Tensor
from lorax.models.llama import LLAMA
from tests.models import contract
from tests.models.contract import DYNAMIC, LINEAR, LLAMA3, MORE_YARN, ROPES, YARN, Tiny, relative

# One of each model type, which has all that the type may have.
TINY = {
    "llama": Tiny(
        "Llama", dict(attention_bias=True, mlp_bias=True, head_dim=16, tie_word_embeddings=True)
    ),
    "mistral": Tiny("Mistral", dict(sliding_window=7)),
    "qwen2": Tiny("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": Tiny(
        "Qwen3",
        dict(
            head_dim=16,
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
}
MODEL_TYPES = [name for family in FAMILIES for name in family.model_types]

# Logits and greedy search of what differs from those.
LOGITS = {
    "llama": Tiny("Llama"),
    "llama-heads-not-grouped": Tiny("Llama", dict(num_key_value_heads=4)),
    "llama-tied": Tiny("Llama", dict(tie_word_embeddings=True)),
    "llama-attention-bias": Tiny("Llama", dict(attention_bias=True)),
    "llama-mlp-bias": Tiny("Llama", dict(mlp_bias=True)),
    "llama-wide-heads": Tiny("Llama", dict(head_dim=16)),
    "llama-llama3": Tiny("Llama", dict(rope_parameters=LLAMA3)),
    "llama-linear": Tiny("Llama", dict(rope_parameters=LINEAR)),
    "llama-dynamic-within": Tiny("Llama", dict(rope_parameters=DYNAMIC)),
    "llama-dynamic-beyond": Tiny(
        "Llama", dict(rope_parameters=DYNAMIC, max_position_embeddings=10)
    ),
    "llama-yarn": Tiny("Llama", dict(rope_parameters=YARN)),
    "llama-yarn-scales": Tiny("Llama", dict(rope_parameters=YARN | MORE_YARN)),
    "llama-yarn-attention-factor": Tiny(
        "Llama", dict(rope_parameters=YARN | dict(attention_factor=1.3))
    ),
    "mistral": Tiny("Mistral", dict(sliding_window=None)),
    "qwen2": Tiny("Qwen2"),
    "qwen2-layer-types": Tiny(
        "Qwen2",
        dict(
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "qwen2-tied": Tiny("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": Tiny("Qwen3", dict(head_dim=16)),
    "qwen3-bias-tied": Tiny(
        "Qwen3", dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)
    ),
}
GREEDY = {
    "llama": Tiny("Llama"),
    "llama-dynamic": Tiny(
        "Llama", dict(rope_parameters=DYNAMIC | dict(factor=3.0), max_position_embeddings=6)
    ),
    "mistral-window": Tiny("Mistral", dict(sliding_window=4)),
    "qwen2-window-tied": Tiny(
        "Qwen2",
        dict(
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=1,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3": Tiny("Qwen3", dict(head_dim=16)),
}
PACKED = {
    "full": Tiny("Llama"),
    "dynamic": Tiny(
        "Llama", dict(max_position_embeddings=6, rope_parameters=DYNAMIC | dict(factor=4.0))
    ),
    "window": Tiny("Mistral", dict(sliding_window=4)),
}


def family_of(model_type):
    return next(family for family in FAMILIES if model_type in family.model_types)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_contract_holds(model_type, tmp_path):
    contract.check_family(family_of(model_type), TINY[model_type], tmp_path)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_written_reads_back_here_and_in_transformers(model_type, rope):
    tiny, rope = TINY[model_type], ROPES[rope]
    config = contract.check_config(family_of(model_type), tiny, rope_parameters=dict(rope))
    assert family_of(model_type).types[model_type].window == "none" or any(
        config.window(layer) for layer in range(config.num_hidden_layers)
    )
    assert tiny.config(**config.to_hf()).rope_parameters == rope


@pytest.mark.slow
@pytest.mark.parametrize("case", LOGITS)
def test_logits_equal_those_of_transformers(case, tmp_path):
    contract.check_logits(LOGITS[case], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", GREEDY)
def test_greedy_equals_transformers(case, tmp_path):
    contract.check_generation(GREEDY[case], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", PACKED)
def test_packed_documents_have_the_logits_they_have_alone(case):
    config = PACKED[case].config(num_hidden_layers=3).to_dict()
    contract.check_packed(read_architecture(config, "here"))


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16(tmp_path):
    model = LOGITS["qwen3"].model()
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, contract.VOCABULARY, (2, 24))
    with torch.no_grad():
        exact = model(torch.from_numpy(ids)).logits.numpy()
        theirs = model.to(torch.bfloat16)(torch.from_numpy(ids)).logits.float().numpy()
    ours = load_model(tmp_path, dtype=jnp.bfloat16)
    logits = jax.jit(lambda m, x: m(x))(ours, jnp.asarray(ids, jnp.int32))
    assert relative(logits, exact) <= 1.5 * relative(theirs, exact)


class OtherConfig(transformers.LlamaConfig):
    """Of a family that lorax does not have."""

    model_type = "other"


OTHER = dataclasses.replace(
    LLAMA,
    types={"other": LLAMA.types["llama"]},
    tensors=(Tensor(r"(.*)\.mlp\.down_proj\.(.*)", r"\1.feed_forward.out.\2"),),
)
STORED = ((r"\.mlp\.down_proj\.", ".feed_forward.out."),)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_one_entry_in_the_list_is_a_new_family(monkeypatch, tmp_path):
    tiny = Tiny("Llama", dict(mlp_bias=True), OtherConfig, STORED)
    with pytest.raises(ValueError, match=r"model_type must be one of .*, got 'other'"):
        read_architecture(tiny.config().to_dict(), "here")
    monkeypatch.setattr("lorax.models.families.FAMILIES", [*FAMILIES, OTHER])
    contract.check_family(OTHER, tiny, tmp_path)


def words_of(path):
    """Yields (line, word) of the names and texts of a file; comments and docstrings aside."""
    source = path.read_text(encoding="utf-8")
    documents = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.STRING, tokenize.FSTRING_MIDDLE):
            if token.start[0] not in documents:
                yield from ((token.start[0], word) for word in re.findall(r"\w+", token.string))


def test_no_family_is_named_outside_its_own_file():
    root = Path(lorax.__file__).parent
    own = {root / "models" / name for name in ("families.py", "llama.py", "qwen.py")}
    names = {name for family in FAMILIES for name in (*family.model_types, *family.architectures)}
    found = [
        f"{path.relative_to(root)}:{line}: {word}"
        for path in sorted({*root.rglob("*.py")} - own)
        for line, word in words_of(path)
        if word in names
    ]
    assert not found
    own_words = {word for path in own for _, word in words_of(path)}
    assert names <= own_words  # the search finds them where they are
