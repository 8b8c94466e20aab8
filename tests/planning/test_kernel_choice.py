"""What a run says about its kernels: which groups there are, and what is refused."""

import pytest
from flax import nnx

import lorax
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.planning.kernels import check_kernels, kernel_choices
from lorax_kernels import tuning
from lorax_kernels.device import interpreted

MODEL = read_architecture(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
    "test",
)


def choices(kernels="auto", dtype="bfloat16", **lora):
    config = lorax.RunConfig.model_validate(
        {
            "model": {"name_or_path": "here", "dtype": dtype, "kernels": kernels},
            "data": {"train": "rows.jsonl", "max_seq_length": 64},
            "train": {"per_device_train_batch_size": 2},
            "save": {"output_dir": "out"},
        }
    )
    settings = lorax.LoraConfig(r=8, **lora)
    model = nnx.eval_shape(
        lambda: lorax.apply_lora(CausalLM(MODEL, rngs=nnx.Rngs(0)), settings, rngs=nnx.Rngs(1))
    )
    return config, model


def test_every_group_is_named_once_with_its_frozen_members():
    config, model = choices(target_modules=("q_proj", "v_proj", "down_proj", "up_proj"))
    names = {choice.layers for choice in kernel_choices(config, model)}
    assert names == {"self_attn.q_proj+k_proj+v_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"}


def test_pallas_is_refused_where_it_cannot_run_and_the_layers_are_named():
    with pytest.raises(ValueError, match=r"model\.kernels is pallas, but for .*up_proj.* Hopper"):
        check_kernels(*choices("pallas"))
    with (
        interpreted(132),
        pytest.raises(ValueError, match=r"up_proj.* takes bfloat16 and float16, got float32"),
    ):
        check_kernels(*choices("pallas", dtype="float32"))
    with interpreted(132):
        check_kernels(*choices("pallas"))


def test_auto_says_what_the_table_says(monkeypatch):
    asked = []

    def is_faster(*sizes):
        asked.append(sizes)
        return sizes[2] == 384

    monkeypatch.setattr(tuning, "is_faster", is_faster)
    with interpreted(132):
        found = {choice.layers: choice.kernel for choice in kernel_choices(*choices())}
    assert (128, 128, 384, 8) in asked
    assert found["self_attn.q_proj+k_proj+v_proj"] == "pallas"
    assert found["mlp.down_proj"] == "xla"
