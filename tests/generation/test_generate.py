"""Generation: equal to transformers' greedy search, row by row independent, sampling in bounds."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax.generation.generate import generate
from lorax.generation.sampling import Sampling, choose_tokens
from lorax.interop.stop_tokens import (
    STOP_TOKENS_FILE,
    generation_settings,
    read_stop_tokens,
    stop_token_ids,
)
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from tests.tiny import SMALL

pytestmark = pytest.mark.slow

PROMPTS = [[5, 9, 1], [7], [3, 4, 8, 2, 60, 11, 30, 12]]


@pytest.fixture(scope="module")
def model():
    config = read_architecture(dict(SMALL, model_type="llama"), "here")
    model = CausalLM(config, rngs=nnx.Rngs(0))
    # Twenty times the usual deviation, so that the most likely token depends on the context.
    return jax.tree.map(lambda x: x if x.ndim == 1 else 20 * x, model)


def test_a_batch_equals_its_rows_one_by_one(model):
    batch = generate(model, PROMPTS, max_new_tokens=10, stop_ids=())
    alone = [generate(model, [p], max_new_tokens=10, stop_ids=())[0] for p in PROMPTS]
    assert batch == alone
    assert len({tuple(row) for row in batch}) > 1


def test_padding_content_does_not_matter(model):
    assert generate(model, PROMPTS, max_new_tokens=6, stop_ids=()) == generate(
        model, PROMPTS, max_new_tokens=6, stop_ids=(), pad_id=44
    )


def test_a_row_ends_before_its_stop_token_and_others_go_on(model):
    free = generate(model, PROMPTS, max_new_tokens=10, stop_ids=())
    stop = free[0][4]
    stopped = generate(model, PROMPTS, max_new_tokens=10, stop_ids=[stop])
    cut = lambda row: row[: row.index(stop)] if stop in row else row
    assert stopped == [cut(row) for row in free]


def test_max_new_tokens_is_the_limit(model):
    rows = generate(model, PROMPTS, max_new_tokens=33, stop_ids=())
    assert [len(row) for row in rows] == [33] * 3
    assert [r[:1] for r in rows] == generate(model, PROMPTS, max_new_tokens=1, stop_ids=())


def test_dynamic_rope_reads_the_length_of_the_row_and_not_of_the_padding():
    settings = dict(
        SMALL,
        model_type="llama",
        max_position_embeddings=8,
        rope_scaling=dict(type="dynamic", factor=4.0),
    )
    model = CausalLM(read_architecture(settings, "here"), rngs=nnx.Rngs(0))
    model = jax.tree.map(lambda x: x if x.ndim == 1 else 20 * x, model)
    short, long = [5, 9, 1, 7], list(range(1, 40))
    (first,) = generate(model, [short], max_new_tokens=1, stop_ids=())
    assert first == [int(model(jnp.asarray([short]))[0, -1].argmax())]
    assert generate(model, [short, long], max_new_tokens=1, stop_ids=())[0] == first


def test_sampling_is_decided_by_the_seed(model):
    sample = lambda seed: generate(
        model, PROMPTS, max_new_tokens=12, stop_ids=(), temperature=1.5, seed=seed
    )
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_top_k_1_and_a_tiny_top_p_are_greedy(model):
    greedy = generate(model, PROMPTS, max_new_tokens=6, stop_ids=())
    either: list[dict[str, Any]] = [dict(top_k=1), dict(top_p=1e-6)]
    for options in either:
        assert greedy == generate(
            model, PROMPTS, max_new_tokens=6, stop_ids=(), temperature=1.0, **options
        )


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (dict(top_k=2), {1, 3}),
        (dict(top_p=0.5), {1, 3}),
        (dict(top_p=0.75), {0, 1, 3}),
        (dict(top_k=3, top_p=0.5), {1, 3}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_sampling_keeps_to_the_most_likely_tokens(options, allowed):
    logits = jnp.log(jnp.array([0.2, 0.3, 0.1, 0.4]))
    logits = jnp.broadcast_to(logits[None], (400, 4))
    drawn = choose_tokens(logits, jax.random.key(0), jnp.int32(0), Sampling(1.0, **options))
    assert set(np.asarray(drawn).tolist()) == allowed


def test_samples_follow_the_distribution():
    logits = jnp.log(jnp.array([0.2, 0.3, 0.1, 0.4]))
    drawn = choose_tokens(
        jnp.broadcast_to(logits[None] * 2, (4000, 4)),
        jax.random.key(0),
        jnp.int32(0),
        Sampling(2.0),
    )
    counts = np.bincount(np.asarray(drawn), minlength=4)
    expected = 4000 * np.array([0.2, 0.3, 0.1, 0.4])
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 16.3  # 99.9 % of draws, three degrees of freedom


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(temperature=-1.0), "temperature must be 0"),
        (dict(temperature=float("nan")), "temperature must be 0"),
        (dict(temperature=1.0, top_k=0), "top_k must be at least 1"),
        (dict(temperature=1.0, top_p=0.0), r"top_p must be in \(0, 1\]"),
        (dict(temperature=1.0, top_p=1.5), r"top_p must be in \(0, 1\]"),
        (dict(top_k=5), "set a temperature above 0"),
        (dict(max_new_tokens=0), "max_new_tokens must be 1 to 2147483647, got 0"),
        (dict(max_new_tokens=2**65), "max_new_tokens must be 1 to 2147483647"),
        (dict(seed=-1), "seed must be 0 to 4294967295, got -1"),
        (dict(seed=2**65), "seed must be 0 to 4294967295"),
        (dict(top_k=0, top_p=2.0, temperature=1.0), "top_k must .*, got 0; top_p must .*, got 2"),
        (dict(prompts=[[1], []]), r"prompts\[1\] is empty"),
        (dict(prompts=[[1], [2, 61]]), r"prompts\[1\] holds 61, outside the vocabulary \[0, 61\)"),
        (dict(pad_id=-1), "pad_id holds -1"),
    ],
)
def test_what_cannot_be_done_is_refused(model, change, message):
    options: dict[str, Any] = dict(prompts=[[1]], max_new_tokens=1, stop_ids=()) | change
    with pytest.raises(ValueError, match=message):
        generate(model, **options)


def test_no_prompts_give_no_rows(model):
    assert generate(model, [], max_new_tokens=3, stop_ids=()) == []


def test_stop_tokens_are_collected_from_all_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert stop_token_ids(tmp_path, SimpleNamespace(eos_token_id=3)) == (9, 7, 3)
    assert stop_token_ids(tmp_path) == (9, 7)
    assert stop_token_ids(tmp_path, trained=[11, 7, 5]) == (9, 7, 5, 11)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "eos_token_id is missing: write the ids"),
        ('{"tokens": []}', "eos_token_id is missing: write the ids"),
        ('{"eos_token_id": null}', "eos_token_id is null: write the ids"),
        ('{"eos_token_id": [true]}', "eos_token_id must be a token id"),
    ],
)
def test_a_run_that_does_not_say_its_stop_tokens_is_refused(tmp_path, text, said):
    path = tmp_path / STOP_TOKENS_FILE
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path}: {said}.*, or remove the file"):
        read_stop_tokens(tmp_path)
    path.write_text('{"eos_token_id": []}')
    assert read_stop_tokens(tmp_path) == ()
    path.unlink()
    assert read_stop_tokens(tmp_path) is None


def test_a_checkpoint_without_stop_tokens_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="from Python: pass stop_ids"):
        stop_token_ids(tmp_path, SimpleNamespace(eos_token_id=None))
    assert stop_token_ids(tmp_path, trained=[4]) == (4,)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [{"id": 2}, 2**31, -1, "2", 2.0, True, [[2]], [2, None]])
def test_what_is_no_token_id_is_refused_with_its_file(tmp_path, file, value):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=rf"{file}: eos_token_id must be a token id, .*or remove"):
        stop_token_ids(tmp_path)


@pytest.mark.parametrize(
    ("before", "written"),
    [
        ({"eos_token_id": 0}, [0, 2]),
        ({"eos_token_id": [5, 0], "pad_token_id": 1, "top_p": 0.9}, [5, 0, 2]),
        ({"temperature": 0.6}, [0, 2]),
    ],
)
def test_generation_settings_name_what_was_trained_and_keep_the_rest(tmp_path, before, written):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    (tmp_path / "generation_config.json").write_text(json.dumps(before))
    stop_ids = stop_token_ids(tmp_path, trained=[2])
    settings = generation_settings(tmp_path, stop_ids)
    assert settings == before | {"eos_token_id": written}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert generation_settings(tmp_path, stop_ids) is None


def test_a_base_without_generation_settings_keeps_what_transformers_would_take(tmp_path):
    config = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": None, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert generation_settings(tmp_path, [0]) is None
    assert generation_settings(tmp_path, [0, 2]) == {"bos_token_id": 1, "eos_token_id": [0, 2]}


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-38, 1e-30])
def test_a_temperature_near_zero_takes_the_most_likely_token(model, temperature):
    greedy = generate(model, PROMPTS, max_new_tokens=6, stop_ids=())
    cold = generate(model, PROMPTS, max_new_tokens=6, stop_ids=(), temperature=temperature)
    assert cold == greedy


def test_a_temperature_beyond_float32_draws_evenly():
    logits = jnp.broadcast_to(jnp.array([[0.0, 50.0, 100.0, -100.0]]), (4000, 4))
    drawn = choose_tokens(logits, jax.random.key(0), jnp.int32(0), Sampling(1e300))
    counts = np.bincount(np.asarray(drawn), minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # 99.9 % of draws, three degrees of freedom
