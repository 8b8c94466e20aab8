"""Adapters against the installed PEFT: exported ones load there, PEFT's own load here."""

import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import lorax
from lorax.adapters.nnx.merge import merge_lora
from lorax.adapters.nnx.tree import adapted_layers
from lorax.interop.load import load_model
from lorax.interop.peft import adapter_tensors, load_adapter, save_adapter
from lorax.interop.save import save_model
from tests.bounds import rounding

pytestmark = pytest.mark.slow

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = np.arange(22).reshape(2, 11) * 4 % 96
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

VARIANTS = {
    "plain": ("llama", {"target_modules": "all-linear"}),
    "few": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 5}),
    "rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {r".*\.2\.mlp\..*": 7, "k_proj": 3},
        },
    ),
    "rslora with patterns": (
        "llama",
        {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"o_proj": 2, "layers.0.*": 5}},
    ),
    "some layers": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    ),
    "exclusion": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*"}),
    "bias=lora_only": ("llama", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "bias=all": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "qwen2 biases": ("qwen2", {"target_modules": "all-linear", "bias": "lora_only"}),
    "head trained whole": ("llama", {"target_modules": ALL, "modules_to_save": ["lm_head"]}),
    "norms trained whole": (
        "llama",
        {"target_modules": ALL, "modules_to_save": ["input_layernorm", "model.norm"]},
    ),
    "adapted head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "adapted embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True}),
    "tied": ("tied", {"target_modules": "all-linear"}),
    "tied, adapted embedding": (
        "tied",
        {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens|lm_head": 2}},
    ),
    "tied, head trained whole": ("tied", {"target_modules": ALL, "modules_to_save": ["lm_head"]}),
    "tied, embedding trained whole": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
}
PORTABLE = ["plain", "few", "rslora", "patterns", "rslora with patterns", "some layers", "tied"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of random checkpoints, with random biases too."""
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(
            LlamaConfig(**SHAPE, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
        ),
        "tied": LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    }
    found = {}
    for name, model in models.items():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        found[name] = tmp_path_factory.mktemp(name) / "base"
        model.save_pretrained(found[name])
    return found


def torch_base(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def jax_logits(model):
    return np.asarray(model(jnp.asarray(TOKENS)), np.float32)


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def randomise(model, scale=0.2):
    """Gives everything that trains a value of its own."""
    graph, trainable, rest = lorax.split_trainable(model)
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noise = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, noise), rest)


def adapted_model(bases, variant):
    kind, settings = VARIANTS[variant]
    model = load_model(bases[kind], dtype=jnp.float32)
    config = lorax.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings})
    return bases[kind], model, randomise(lorax.apply_lora(model, config, rngs=nnx.Rngs(0)))


def load_in_peft(base, directory):
    """Loads an adapter in PEFT; any warning about keys, shapes or tying fails."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, directory).eval()
    about = [str(w.message) for w in caught if "is_gradient_checkpointing" not in str(w.message)]
    assert not about
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_adapter_gives_the_same_logits_in_peft(bases, variant, tmp_path):
    base, plain, adapted = adapted_model(bases, variant)
    save_adapter(adapted, tmp_path / "out", base_model_name_or_path=str(base))
    peft_model = load_in_peft(torch_base(base), tmp_path / "out")
    assert relative(jax_logits(adapted), torch_logits(peft_model)) <= 1e-5
    assert relative(jax_logits(adapted), jax_logits(plain)) > 1e-2
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    state = peft_model.state_dict()  # PEFT takes biases of B in its own for cut matrices
    theirs = get_peft_model_state_dict(peft_model, state, save_embedding_layers=False)
    assert stored.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(stored[key], value.numpy())


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_adapter_loads_back_bit_for_bit(bases, variant, tmp_path):
    _, plain, adapted = adapted_model(bases, variant)
    save_adapter(adapted, tmp_path / "out")
    again = load_adapter(plain, tmp_path / "out")
    ours, theirs = adapter_tensors(adapted), adapter_tensors(again)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(theirs[key], value)
    np.testing.assert_array_equal(jax_logits(again), jax_logits(adapted))


# Overlapping patterns change places when PEFT saves them sorted: not even PEFT loads that adapter.
LOADABLE_BY_PEFT = [v for v in VARIANTS if v != "rslora with patterns"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", LOADABLE_BY_PEFT)
def test_adapter_made_by_peft_loads_here(bases, variant, tmp_path):
    kind, settings = VARIANTS[variant]
    config = PeftLoraConfig(
        r=4,
        lora_alpha=settings.get("lora_alpha", 8),
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        ensure_weight_tying=variant.startswith("tied, "),
        **{k: v for k, v in settings.items() if k != "lora_alpha"},
    )
    if variant == "tied, head trained whole":
        config.modules_to_save = ["embed_tokens"]  # what PEFT itself ties the head to
    peft_model = get_peft_model(torch_base(bases[kind]), config).eval()
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    peft_model.save_pretrained(tmp_path / "theirs")
    adapted = load_adapter(load_model(bases[kind], dtype=jnp.float32), tmp_path / "theirs")
    assert relative(jax_logits(adapted), torch_logits(peft_model)) <= 1e-5
    save_adapter(adapted, tmp_path / "ours")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert ours.keys() == {k for k in theirs if not k.endswith("base_layer.weight")}
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_adapters_are_read_as_float32(bases, dtype, tmp_path):
    _, plain, adapted = adapted_model(bases, "plain")
    save_adapter(adapted, tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    save_file({k: v.astype(dtype) for k, v in load_file(path).items()}, path)
    layer = next(iter(adapted_layers(load_adapter(plain, tmp_path / "out")).values()))
    assert layer.adapter.lora_a.dtype == jnp.float32


@pytest.mark.parametrize("variant", PORTABLE)
def test_portable_export_needs_only_alpha_over_r(bases, variant, tmp_path):
    base, _, adapted = adapted_model(bases, variant)
    save_adapter(adapted, tmp_path / "out", format="peft-portable")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    model = torch_base(base)
    for key in [k for k in tensors if "lora_A" in k]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        assert a.shape[0] == b.shape[1] == config["r"]
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = torch.from_numpy(b @ a) * (config["lora_alpha"] / config["r"])
        model.get_submodule(name).weight.data += update
    assert relative(torch_logits(model), jax_logits(adapted)) <= 1e-5
    peft_model = load_in_peft(torch_base(base), tmp_path / "out")
    assert relative(jax_logits(adapted), torch_logits(peft_model)) <= 1e-5
    assert not (config["use_rslora"] or config["rank_pattern"] or config["alpha_pattern"])


@pytest.mark.parametrize("variant", ["bias=lora_only", "head trained whole"])
def test_portable_export_refuses_what_it_cannot_hold(bases, variant, tmp_path):
    _, _, adapted = adapted_model(bases, variant)
    with pytest.raises(ValueError, match="holds A and B only, but this run also trained"):
        save_adapter(adapted, tmp_path / "out", format="peft-portable")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("r, hidden", [(4, 64), (16, 128), (128, 256), (200, 256)])
def test_bfloat16_merge_equals_pefts_default(r, hidden, tmp_path):
    """Up to the order in which the r products are summed in float32, which the CPU decides."""
    torch.manual_seed(1)
    shape = SHAPE | {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    config = lorax.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["o_proj", "up_proj"])
    base = load_model(tmp_path / "base", dtype=jnp.bfloat16)
    adapted = randomise(lorax.apply_lora(base, config, rngs=nnx.Rngs(0)), 0.02)
    save_adapter(adapted, tmp_path / "adapter")
    save_model(merge_lora(adapted), tmp_path / "merged")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    torch_model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    merged: Any = load_in_peft(torch_model, tmp_path / "adapter").merge_and_unload()
    layers = {f"{name}.weight": layer for name, layer in adapted_layers(adapted).items()}
    differing, expected = 0, 4.0
    for key, value in merged.state_dict().items():
        if key == "lm_head.weight":
            continue
        theirs = value.float().numpy()
        distance = np.abs(ours[key].astype(np.float32) - theirs)
        allowed = np.zeros_like(theirs)
        if layer := layers.get(key):
            # Two orders of a sum of r products differ by 2·r·u·Σ|a·b| at most; the sum with the
            # kernel, which may nearly cancel, is rounded to bfloat16 after that.
            products = np.abs(layer.adapter.lora_a[...]) @ np.abs(layer.adapter.lora_b[...])
            allowed = 2 * r * 2.0**-24 * 2 * products.T + 2.0**-7 * np.abs(theirs)
            # What they differ by as a rule, over the spacing, is how often a rounding lies between.
            spacing = np.ldexp(1.0, np.frexp(theirs)[1] - 8)
            expected += np.minimum(rounding(r) * 2 * products.T / spacing, 1).sum()
        assert (distance <= allowed).all()
        differing += (distance > 0).sum()
    assert sum(key in layers for key in ours) == len(layers) == 6
    assert differing <= expected


def test_merged_export_loads_in_transformers_and_gives_the_same_logits(bases, tmp_path):
    merged = ("plain", "tied", "head trained whole", "bias=lora_only", "adapted embedding", "dora")
    for variant in (*merged, "lora_bias", "tied, adapted embedding"):
        _, _, adapted = adapted_model(bases, variant)
        folder = tmp_path / variant.replace(" ", "_")
        save_model(merge_lora(adapted), folder, dtype=jnp.float32)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        model, info = loaded
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert relative(torch_logits(model.eval()), jax_logits(adapted)) <= 1e-5


def test_saving_unmerged_adapters_as_a_model_is_refused(bases, tmp_path):
    _, _, adapted = adapted_model(bases, "plain")
    with pytest.raises(ValueError, match="carries adapters"):
        save_model(adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edit_config(**changes):
    def edit(folder):
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v != "DELETE"}))

    return edit


def edit_tensors(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD_ADAPTERS = {
    "not lora": (edit_config(peft_type="EVIL"), "peft_type must be LORA, got 'EVIL'"),
    "no dora": (edit_config(use_dora=True), "lacks 6 tensors, .*lora_magnitude_vector"),
    "unknown field": (edit_config(surprise=3), "surprise=3 is not supported"),
    "text rank": (edit_config(r="8"), "adapter_config.json"),
    "rank zero": (edit_config(r=0), "adapter_config.json"),
    "alpha not finite": (edit_config(lora_alpha=float("inf")), "adapter_config.json"),
    "dropout 2": (edit_config(lora_dropout=2.0), "adapter_config.json"),
    "corda": (edit_config(init_lora_weights="corda"), "init_lora_weights='corda' changes the base"),
    "no targets": (edit_config(target_modules="DELETE"), "target_modules is missing"),
    "absent target": (edit_config(target_modules=["q_proj", "query"]), "'query' matches no linear"),
    "wrong rank": (edit_config(r=3), r"lora_A.weight has shape \(4, 32\), needed \(3, 32\)"),
    "missing tensor": (edit_tensors(lambda t: t.pop(Q0)), "lacks 1 tensors, first .*q_proj.lora_A"),
    "extra tensor": (edit_tensors(lambda t: t.update({"x": t[Q0]})), "has unexpected 1 .* first x"),
    "wrong prefix": (
        edit_tensors(lambda t: t.update({Q0.removeprefix("base_model.model."): t.pop(Q0)})),
        "lacks 1 tensors",
    ),
    "misshapen": (edit_tensors(lambda t: t.update({Q0: t[Q0][:, :5].copy()})), r"\(4, 5\), needed"),
    "not finite": (
        edit_tensors(lambda t: t.update({Q0: np.full_like(t[Q0], np.nan)})),
        "q_proj.lora_A.weight holds values that are not finite",
    ),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-7]
        ),
        "not a whole safetensors file",
    ),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "is a pickle and is never loaded",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json does not"),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_refuses_a_bad_adapter_by_name(bases, name, tmp_path):
    _, plain, adapted = adapted_model(bases, "few")
    save_adapter(adapted, tmp_path / "out")
    damage, message = BAD_ADAPTERS[name]
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        load_adapter(plain, tmp_path / "out")


def test_an_adapter_of_another_base_is_refused(bases, tmp_path):
    _, _, adapted = adapted_model(bases, "qwen2 biases")
    save_adapter(adapted, tmp_path / "out")
    other = load_model(bases["tied"], dtype=jnp.float32)
    with pytest.raises(ValueError, match="no layer of a target module has a bias"):
        load_adapter(other, tmp_path / "out")


def test_nothing_is_overwritten_and_nothing_half_written(bases, tmp_path):
    _, _, adapted = adapted_model(bases, "few")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        save_adapter(adapted, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    layer = next(iter(adapted_layers(adapted).values()))
    layer.adapter.lora_b.set_value(jnp.full_like(layer.adapter.lora_b[...], jnp.nan))
    with pytest.raises(ValueError, match="not finite"):
        save_adapter(adapted, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
