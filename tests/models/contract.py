"""What holds for every family of models, with transformers and PEFT as the oracles.

`check_family` is all of it. A check asks for a `Tiny`, a small model of the family.
"""

import collections
import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from peft import PeftModel
from safetensors.numpy import load_file, save_file

import lorax
from lorax.adapters.nnx.apply import apply_lora
from lorax.adapters.nnx.tree import adapted_layers, named_modules, split_trainable
from lorax.config.adapter import LoraConfig
from lorax.config.run import load_config
from lorax.generation.generate import generate
from lorax.interop.load import load_model
from lorax.interop.peft import save_adapter
from lorax.interop.save import model_tensors, save_model
from lorax.models.architecture import DecoderConfig
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.models.family import Family
from lorax.objectives.sft import causal_lm_loss
from lorax.planning.kernels import kernel_choices
from lorax_kernels import IGNORED
from tests import tiny

ROOT = Path(__file__).parents[2]
WHERE = "model/config.json"
VOCABULARY = tiny.SMALL["vocab_size"]
SMALL = tiny.SMALL | dict(rms_norm_eps=1e-5)
LLAMA3: dict[str, Any] = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN: dict[str, Any] = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16
)
LINEAR: dict[str, Any] = dict(rope_type="linear", rope_theta=1e4, factor=3.0)
DYNAMIC: dict[str, Any] = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
MORE_YARN = dict(mscale=0.7, mscale_all_dim=1.2, beta_fast=8.0, beta_slow=2.0, truncate=False)
ROPES: dict[str, dict[str, Any]] = {
    "default": dict(rope_type="default", rope_theta=3e4),
    "linear": LINEAR,
    "dynamic": DYNAMIC,
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-all": YARN | MORE_YARN,
    "yarn-attention-factor": YARN | dict(attention_factor=1.3),
}
PROMPTS = [[5, 9, 1], [7], [3, 4, 8, 2, 60, 11, 30, 12]]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A small model of a family, as transformers makes it.

    Attributes:
        name: What its classes begin with, for example ``Llama``.
        settings: Of its configuration, beside or instead of `SMALL`.
        config_class: Of the configuration; None is transformers' own.
        stored: (ours, theirs) names of tensors in its files, patterns for `re.sub`, where they are
            not those of transformers.
    """

    name: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    config_class: Any = None
    stored: tuple[tuple[str, str], ...] = ()

    def config(self, **settings) -> Any:
        """Returns the configuration of transformers."""
        make = self.config_class or getattr(transformers, f"{self.name}Config")
        return make(**SMALL | self.settings | settings)

    def model(self, **settings) -> Any:
        """Returns a torch model whose every weight, norms and biases included, is random."""
        config = self.config(**settings)
        config._attn_implementation = "eager"
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
        return model

    def save(self, model: Any, folder: Path) -> Path:
        """Writes a model of it, the tensors under the names that its family's files have."""
        model.save_pretrained(folder)
        if self.stored:
            path = folder / "model.safetensors"
            tensors = {self.stored_name(k): v for k, v in load_file(path).items()}
            save_file(tensors, path, metadata={"format": "pt"})
        return folder

    def stored_name(self, name: str) -> str:
        """Returns the name in files of the tensor that transformers gives `name`."""
        for ours, theirs in self.stored:
            name = re.sub(ours, theirs, name)
        return name


def relative(ours, reference):
    """Returns ``‖ours - reference‖ / ‖reference‖``, in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def check_config(family: Family, tiny: Tiny, **settings) -> DecoderConfig:
    """What transformers writes is known, and what is written reads back, here and there."""
    config = tiny.config(**settings)
    ours = read_architecture(config.to_dict(), WHERE)
    assert ours.family is family and ours.model_type == config.model_type in family.model_types
    assert not ours.notes
    for field in ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(ours, field) == getattr(config, field, ours.head_dim)
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    sliding = [window is not None] * layers
    if getattr(config, "layer_types", None):
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
    windows = [window if slides else None for slides in sliding]
    assert [ours.window(index) for index in range(layers)] == windows
    written = json.loads(json.dumps(ours.to_hf()))
    assert read_architecture(written, WHERE) == ours
    again = type(config)(**written)
    assert read_architecture(again.to_dict(), WHERE) == ours
    # Which class wrote the file is no part of the architecture.
    theirs = config.to_dict() | {"architectures": written["architectures"]}
    assert {name: again.to_dict()[name] for name in theirs} == theirs
    return ours


def check_defaults(tiny: Tiny) -> None:
    """Fields that are absent take the defaults of the transformers class."""
    sizes: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=48,
        num_hidden_layers=30,
        num_attention_heads=32,
    )
    config = type(tiny.config())(**sizes).to_dict()
    ours = read_architecture(sizes | {"model_type": config["model_type"]}, WHERE)
    theirs = read_architecture(config, WHERE)
    assert ours == dataclasses.replace(theirs, bos_token_id=None, eos_token_id=None)


def check_logits(tiny: Tiny, folder: Path) -> None:
    """Logits are those of transformers, float32 against float32; files come out as they went in."""
    model = tiny.model()
    tiny.save(model, folder / "theirs")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 24))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    ours = load_model(folder / "theirs", dtype=jnp.float32)
    logits = jax.jit(lambda m, x: m(x))(ours, jnp.asarray(ids, jnp.int32))
    assert logits.dtype == jnp.float32
    assert relative(logits, expected) <= 1e-5
    save_model(ours, folder / "ours", dtype=jnp.float32)
    stored, written = (load_file(folder / x / "model.safetensors") for x in ("theirs", "ours"))
    assert written.keys() == stored.keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(written[name], value)


def adapted_pair(model: Any, base: Path, folder: Path) -> tuple[CausalLM, Any]:
    """Returns a model with random adapters, and a function that makes the same in PEFT.

    Args:
        model: Of transformers.
        base: Where it is saved.
        folder: An empty one, for the adapter.
    """
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"o_proj": 2})
    adapted = apply_lora(load_model(base, dtype=jnp.float32), config, rngs=nnx.Rngs(0))
    for index, layer in enumerate(adapted_layers(adapted).values()):
        # With B at zero the gradient of A would be zero and would test nothing.
        shape = layer.adapter.lora_b.shape
        layer.adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(index), shape))
    save_adapter(adapted, folder / "adapter")

    def make_torch():
        return PeftModel.from_pretrained(
            copy.deepcopy(model), folder / "adapter", is_trainable=True
        )

    return adapted, make_torch


def make_batch(vocabulary: int, draw: np.random.Generator, rows: int = 4, length: int = 24):
    """Returns tokens, and labels that are not shifted yet."""
    tokens = draw.integers(0, vocabulary, (rows, length)).astype(np.int32)
    tokens[:, 1::2] = tokens[:, ::2]  # something to learn
    supervised = np.arange(length)[None, :] >= draw.integers(1, length // 2, (rows, 1))
    return tokens, np.where(supervised, tokens, IGNORED)


def as_ours(tokens, labels):
    """Returns a batch as lorax reads it."""
    shifted = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    return {"input_ids": jnp.asarray(tokens), "labels": jnp.asarray(shifted)}


def torch_loss(model, tokens, labels):
    """Returns the mean over supervised tokens, computed by transformers."""
    return model(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
    ).loss


def check_gradients(adapted: CausalLM, make_torch: Any) -> None:
    """The loss and the gradient of every adapter are PEFT's, of an `adapted_pair`."""
    tokens, labels = make_batch(adapted.config.vocab_size, np.random.default_rng(0))
    torch_model = make_torch()
    expected_loss = torch_loss(torch_model, tokens, labels)
    expected_loss.backward()
    expected_loss = expected_loss.detach()
    graph, trainable, frozen = lorax.split_trainable(adapted)

    def mean_loss(trainable):
        total, count = causal_lm_loss(nnx.merge(graph, trainable, frozen), as_ours(tokens, labels))
        return total / count.astype(jnp.float32)

    loss, gradients = jax.value_and_grad(mean_loss)(trainable)
    assert abs(float(loss) - float(expected_loss)) <= 1e-5 * float(expected_loss)
    model = nnx.merge(graph, gradients, frozen)
    compared = 0
    for name, layer in adapted_layers(model).items():
        module = torch_model.get_submodule(f"base_model.model.{name}")
        adapter = layer.adapter
        for ours, theirs in ((adapter.lora_a, module.lora_A), (adapter.lora_b, module.lora_B)):
            expected = theirs["default"].weight.grad.numpy().T
            assert np.abs(expected).max() > 0
            assert relative(np.asarray(ours[...]), expected) <= 1e-4, name
            compared += 1
    assert compared == len([p for p in torch_model.parameters() if p.requires_grad])
    linear = [name for name, m in torch_model.named_modules() if type(m) is torch.nn.Linear]
    others = [name for name in linear if not re.search(r"\.(lora_[AB]|base_layer)\b", name)]
    assert others == ["base_model.model.lm_head"]


def _adapted(config: DecoderConfig, **options) -> CausalLM:
    model = CausalLM(config, **options, rngs=nnx.Rngs(0))
    return apply_lora(model, LoraConfig(r=4, target_modules="all-linear"), rngs=nnx.Rngs(1))


def check_kept(config: DecoderConfig) -> None:
    """What a layer keeps for the backward pass is what the family says, and x·A besides.

    Without recomputation XLA decides what is kept, and "offload" keeps more where cuDNN attends.
    """
    length = 23  # divides the size of no weight

    def kept(layers: int, policy: Any) -> collections.Counter:
        options: dict[str, Any] = dict(gradient_checkpointing=policy, kept_layers=0)
        types = config.layer_types[:1] * layers
        sizes = dataclasses.replace(config, num_hidden_layers=layers, layer_types=types)
        model = _adapted(sizes, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, **options)
        graph, trainable, frozen = split_trainable(model)
        ids = jnp.zeros((1, length), jnp.int32)
        run = lambda t, f: nnx.merge(graph, t, f, copy=True).hidden_states(ids)
        pull = jax.eval_shape(lambda t, f: jax.vjp(lambda t: run(t, f), t)[1], trainable, frozen)
        arrays = [x for x in jax.tree.leaves(pull) if math.prod(x.shape) % length == 0]
        sizes = [(x.dtype, math.prod(x.shape) // length) for x in arrays]
        return collections.Counter(size for dtype, size in sizes if dtype == jnp.bfloat16)

    adapters = adapted_layers(_adapted(config))
    ranks = sum(layer.adapter.spec.r for layer in adapters.values()) // config.num_hidden_layers
    for policy in ("selective", "full", "offload"):
        more = kept(3, policy) - kept(2, policy)
        stated = config.family.kept(config, policy).elements
        assert sum(size * count for size, count in more.items()) == stated + ranks, policy
    without, selective = (config.family.kept(config, p) for p in ("none", "selective"))
    assert dataclasses.replace(without, inputs=()) == selective
    for names, size in without.inputs:
        layers = [each for name, each in adapters.items() if name.rpartition(".")[2] in names]
        assert {layer.in_features for layer in layers} == {size}


def check_placement(family: Family, config: DecoderConfig) -> None:
    """Layers that are said to run together do; every parameter has a partition that fits it."""
    model = _adapted(config)
    run = load_config(ROOT / "configs" / "tiny_cpu.yaml")
    groups = {choice.layers.rpartition(".")[2] for choice in kernel_choices(run, model)}
    assert {"+".join(names) for names in family.together} <= groups
    plain = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(plain)):
        name = ".".join(map(str, path))
        spec = next(spec for pattern, spec in family.parts if re.fullmatch(pattern, name))
        assert len(spec) <= len(variable.get_value().shape), name


def pack(rows, length):
    """Returns ids, positions and segment ids of rows of documents, padded on the right."""
    fill = lambda parts: np.pad(np.concatenate(parts), (0, length - sum(map(len, parts))))
    ids = [fill(row) for row in rows]
    positions = [fill([np.arange(len(d)) for d in row]) for row in rows]
    segments = [fill([np.full(len(d), i + 1) for i, d in enumerate(row)]) for row in rows]
    return [jnp.asarray(np.stack(x), jnp.int32) for x in (ids, positions, segments)]


def draw_documents():
    """Returns three rows of documents."""
    rng = np.random.default_rng(0)
    sizes = [[5, 9, 1], [16], [7, 4]]
    return [[rng.integers(0, VOCABULARY, size) for size in row] for row in sizes]


def check_packed(config: DecoderConfig) -> None:
    """Packed documents have the logits that they have alone."""
    model = CausalLM(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    # Larger than at birth, so that attention is far from uniform.
    model = jax.tree.map(lambda x: x if x.ndim == 1 else 10 * x, model)
    run, rows = jax.jit(lambda model, *inputs: model(*inputs)), draw_documents()
    packed = run(model, *pack(rows, 16))
    for row, documents in enumerate(rows):
        start = 0
        for document in documents:
            size = len(document)
            alone = run(model, *pack([[document]], 16)[:2])[0, :size]
            found = packed[row, start : start + size]
            np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-5)
            start += size


def check_generation(tiny: Tiny, folder: Path) -> None:
    """Greedy search finds what it finds in transformers, in a batch as row by row."""
    reference = tiny.model(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    ours = load_model(tiny.save(reference, folder), dtype=jnp.float32)
    found = generate(ours, PROMPTS, max_new_tokens=12, stop_ids=())
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        # A dynamic rotary embedding remembers the longest text that it has seen; a copy has not.
        fresh = copy.deepcopy(reference)
        with torch.no_grad():
            expected = fresh.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )
        assert tokens == expected[0, len(prompt) :].tolist()


def check_names(tiny: Tiny, config: DecoderConfig) -> None:
    """Tensors and parameters are one to one, and have the names and shapes that files have."""
    model = tiny.model()
    theirs = {tiny.stored_name(k): tuple(v.shape) for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    ours = CausalLM(config, rngs=nnx.Rngs(0))
    assert {name: value.shape for name, value in model_tensors(ours)} == theirs
    linear = {name for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert linear <= {*named_modules(ours), *ours.tied_modules}


def check_family(family: Family, tiny: Tiny, folder: Path) -> None:
    """Checks all that holds for a model of the family.

    Args:
        family: One that `lorax.models.families.FAMILIES` lists.
        tiny: A model of it.
        folder: An empty one.
    """
    config = check_config(family, tiny)
    check_defaults(tiny)
    check_names(tiny, config)
    check_placement(family, config)
    check_logits(tiny, folder)
    model = tiny.model()
    check_gradients(*adapted_pair(model, tiny.save(model, folder / "base"), folder))
    check_kept(config)
    check_packed(config)
    check_generation(tiny, folder / "generates")
