"""The memory of a training step, from shapes alone: bytes by purpose, and what fits a device.

It adds up what is stated elsewhere: what a layer keeps per token, by its family, for each policy of
`lorax.models.stack.recompute`; the columns of the adapters; the bytes of what is stored. To these
come the working set of the layer or of the loss that stands at the peak, and the arithmetic. The
rates are those measured on one H200 (docs/measurements/step_h200.jsonl); another GPU's follow from
them by the ratios of data sheets.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax.adapters.method import Cost
from lorax.adapters.nnx.adapter import cost_of
from lorax.adapters.nnx.tree import adapted_layers, split_trainable
from lorax.config.run import RunConfig
from lorax.devices.host_memory import HostArray, embedding_obstacle, embedding_on_host
from lorax.models.architecture import DecoderConfig
from lorax.models.decoder import CausalLM
from lorax.models.family import Family
from lorax.models.stack.recompute import REPEATING, GradientCheckpointing, Recomputation
from lorax.objectives.linear_loss import logit_chunks
from lorax.system.gpus import H200, Gpu
from lorax.system.hardware import GIB
from lorax.training.optim.optimizer import make_optimizer
from lorax_kernels import padded_rank

POLICIES: tuple[GradientCheckpointing, ...] = ("none", "selective", "full", "offload")

FILLED = 0.97
"""Of what there is, by layers kept that could be recomputed: the estimate errs a little."""

PRODUCT_FLOPS = 705e12  # per second, bfloat16, sustained at the power limit
ATTENTION_FLOPS = 520e12  # of long sequences
ATTENTION_HALF = 800  # tokens at which half of it is reached
REPEATABLE_ATTENTION = 1.25  # times the time, where the backward pass adds up in a fixed order
STREAM_BYTES = 3.3e12
COPY_SECONDS = 15e-6  # of a copy, not hidden behind anything
LAUNCH_SECONDS = 2.6e-6  # of a kernel too small to take longer
LAUNCHES = 88  # of one layer, forward and backward
IN_ANY_CASE = ("gate_proj", "up_proj")
"""Layers whose outputs are kept as they come out of the matmul, whatever multiplies them."""

SKINNY_PASSES = 2.2  # reads of an adapted layer's input and output, for x·A, g, dA and dB


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device at the peak of a training step.

    Attributes:
        weights: Frozen.
        trained: What trains.
        optimizer: Its state.
        gradients: Of what trains, and their sum over micro-batches.
        activations: What the layers keep for the backward pass.
        working: What one layer's backward pass, or the loss, needs besides.
    """

    weights: float
    trained: float
    optimizer: float
    gradients: float
    activations: float
    working: float

    @property
    def peak(self) -> float:
        """Returns the sum."""
        return sum(dataclasses.astuple(self))


class Planner:
    """Predicts memory and time of a run's training step on one device.

    Args:
        config: The run's settings.
        architecture: Of the base model.
        model: The model that trains, or its shapes.
        gpu: The GPU that a step is planned for.

    Attributes:
        spared_by_host: Bytes that `model.offload_embedding` would spare on the device.
        host_embedding: Bytes of the embedding where it is in the host's memory.
    """

    def __init__(
        self, config: RunConfig, architecture: DecoderConfig, model: CausalLM, gpu: Gpu = H200
    ):
        self.config = config
        self.gpu = gpu
        self.architecture = architecture
        _, trainable, frozen = split_trainable(model)
        table = model.model.embed_tokens.embedding
        on_host = embedding_on_host(model)
        # On the host it takes nothing of the device, so there is nothing left to spare.
        self.spared_by_host = 0.0 if embedding_obstacle(model) else _bytes(table)
        self.host_embedding = 0.0 if on_host is None else float(on_host.nbytes)
        self.weights = _bytes(frozen)
        self.trained = _bytes(trainable)
        self.trained_elements = sum(math.prod(x.shape) for x in jax.tree.leaves(trainable))
        init = make_optimizer(config.train, 1_000_000).init
        self.optimizer = _bytes(jax.eval_shape(init, trainable))
        layers = adapted_layers(model)
        self.adapted = {name.rpartition(".")[2] for name in layers}
        costs = {name: cost_of(layer) for name, layer in layers.items()}
        tied = architecture.tie_word_embeddings
        # A lookup reads a few rows; only as the head is an embedding multiplied by.
        self.streamed = sum(
            cost.streamed
            for name, cost in costs.items()
            if tied or layers[name].linear_map.kind != "lookup"
        )
        self.ranks = _kept_columns(costs, architecture.family)
        # Of gate and up the products are kept in any case.
        apart = [cost.products for name, cost in costs.items() if not name.endswith(IN_ANY_CASE)]
        self.products = sum(apart) / architecture.num_hidden_layers
        self.full = not layers
        self.element = jnp.dtype(config.model.dtype).itemsize

    def memory(
        self, policy: GradientCheckpointing, rows: int, length: int, kept_layers: int = 1
    ) -> MemoryPlan:
        """Returns what a micro-batch of `rows` × `length` tokens needs.

        Args:
            policy: What is recomputed in the backward pass.
            rows: Of the micro-batch, on one device.
            length: Tokens of a row.
            kept_layers: See `lorax.models.stack.recompute.Recomputation`.
        """
        c = self.element
        a = self.architecture
        tokens = rows * length
        if policy in REPEATING and kept_layers == a.num_hidden_layers:
            policy = "selective"
        # Of what is offloaded, the layer at hand has its part on the device, and the next one.
        layers = 2 if policy == "offload" else a.num_hidden_layers
        kept = tokens * self._kept_per_token(policy) * layers
        if policy in REPEATING:
            kept += tokens * c * self.ranks
        # Of the layer at hand: the inner product of the MLP, and the gradients of two arrays like
        # its input; those of gate and up take the places of gate and up.
        layer = tokens * c * (2.0 * a.hidden_size + a.intermediate_size)
        if self._writes_scores:
            layer += rows * a.num_attention_heads * length**2 * (c + 8.0)
        elif self.config.train.full_determinism:
            # The gradient of every score, in place of one of q in float32; and the documents' mask.
            scores = 2.0 * length - 4.0 * a.head_dim
            layer += max(0.0, tokens * a.num_attention_heads * scores)
            layer += 2.0 * tokens * length * self.config.data.packing
        in_place = c == 2 and self.config.model.kernels != "xla" and self.gpu.is_hopper
        _, chunk = logit_chunks(rows, length, a.vocab_size, in_place)
        # Logits and their gradient, and the states and their gradient, chunk by chunk.
        logits = rows * chunk * a.vocab_size * c * (1.0 if in_place else 2.0)
        loss = logits + 3 * tokens * a.hidden_size * c
        working = max(layer, loss)
        if policy in REPEATING:
            whole = self._kept_per_token("selective")
            instead = self._kept_per_token(policy)
            # Of what is offloaded, the last layer's part is counted above.
            counted = kept_layers if policy == "full" else min(kept_layers, 1)
            more = tokens * (kept_layers * whole - counted * instead)
            again = tokens * (self._kept_per_token("none") - a.hidden_size * c)
            if more + working > layer + again:
                kept += more  # until the first layer is recomputed
            else:
                working = layer + again
        sums = 2 if self.config.train.gradient_accumulation_steps > 1 else 1
        gradients = 4.0 * self.trained_elements * sums
        return MemoryPlan(self.weights, self.trained, self.optimizer, gradients, kept, working)

    @property
    def _writes_scores(self) -> bool:
        return self.config.model.attn_impl == "xla" or self.element == 4

    def _kept_per_token(self, policy: GradientCheckpointing) -> float:
        """Returns the bytes that one layer keeps per token."""
        kept = self.architecture.family.kept(self.architecture, policy)
        elements = kept.elements
        if policy in ("none", "selective"):
            elements += self.products
        if not self._writes_scores:
            elements += kept.attention
        for names, size in kept.inputs:
            if self.full or not self.adapted.isdisjoint(names):
                elements += size
        return elements * self.element + 4.0 * kept.float32

    def seconds(
        self, policy: GradientCheckpointing, rows: int, length: int, kept_layers: int = 1
    ) -> float:
        """Returns the estimated time of a micro-batch."""
        a = self.architecture
        c = self.element
        tokens = rows * length
        d = a.hidden_size
        f = a.intermediate_size
        layers = a.num_hidden_layers
        q = a.num_attention_heads * a.head_dim
        kv = a.num_key_value_heads * a.head_dim
        down = f * d
        products = layers * (d * (2 * q + 2 * kv) + 3 * down)
        passes = 3.0 if self.full else 2.0
        flops = 2.0 * tokens * (passes * products + 2.0 * d * a.vocab_size)
        attention = 2.0 * tokens * length * q * layers * 3.5  # causal: half of 4·t²·q, and 2.5 back
        streamed = tokens * c * layers * (10.0 * f + 22.0 * d)
        streamed += SKINNY_PASSES * tokens * c * self.streamed
        if policy == "selective":
            streamed += tokens * c * layers * (f + 2.0 * d)
        launches = float(LAUNCHES * layers)
        if policy in REPEATING:
            repeated = layers - kept_layers
            streamed += tokens * c * kept_layers * (f + 2.0 * d)
            flops += 2.0 * tokens * repeated * (products / layers - down)
            streamed += tokens * c * repeated * (f + 8.0 * d)
            launches += 0.4 * LAUNCHES * repeated
            if policy == "full" or self._writes_scores:
                attention += 2.0 * tokens * length * q * repeated
        if self.config.train.full_determinism and not self._writes_scores:
            attention *= REPEATABLE_ATTENTION
        rate = ATTENTION_FLOPS * length / (length + ATTENTION_HALF)
        arithmetic = flops / PRODUCT_FLOPS + attention / rate
        seconds = arithmetic * H200.tflops / self.gpu.tflops
        seconds += streamed / STREAM_BYTES * H200.tb_per_s / self.gpu.tb_per_s
        if policy == "offload":
            seconds += 2.0 * (layers - max(kept_layers, 1)) * COPY_SECONDS
        copies = (
            2.0
            * self.host_bytes(policy, rows, length, kept_layers)
            / (1e9 * self.gpu.host_gb_per_s)
        )
        return max(seconds + launches * LAUNCH_SECONDS, copies)

    def host_bytes(
        self, policy: GradientCheckpointing, rows: int, length: int, kept_layers: int = 1
    ) -> float:
        """Returns what "offload" keeps in the host's memory for a micro-batch."""
        if policy != "offload":
            return 0.0
        layers = self.architecture.num_hidden_layers - max(kept_layers, 1)
        return rows * length * self._kept_per_token(policy) * layers

    def largest_batch(self, policy: GradientCheckpointing, length: int, gib: float) -> int:
        """Returns the most rows of `length` tokens that fit `gib`, 0 if not even one does."""
        return _last(lambda rows: self.memory(policy, rows, length).peak <= gib * GIB)

    def longest_sequence(self, policy: GradientCheckpointing, rows: int, gib: float) -> int:
        """Returns the most tokens per row that fit `gib`, in steps of 128; 0 if none do."""
        return 128 * _last(lambda n: self.memory(policy, rows, 128 * n).peak <= gib * GIB)

    def fastest(self, rows: int, length: int, gib: float) -> Recomputation:
        """Returns what is fastest among what fits, else the smallest.

        Layers beyond the last are kept where they fit `FILLED` of `gib`.
        """

        def peak(r):
            return self.memory(r.policy, rows, length, r.kept_layers).peak / GIB

        def seconds(r):
            return self.seconds(r.policy, rows, length, r.kept_layers)

        policies = [Recomputation(policy) for policy in POLICIES]
        fitting = [r for r in policies if peak(r) <= gib]
        if not fitting:
            return min(policies, key=peak)
        counts = range(2, self.architecture.num_hidden_layers)
        more = [Recomputation(p, k) for p in REPEATING for k in counts]
        return min((*fitting, *(r for r in more if peak(r) <= FILLED * gib)), key=seconds)


def _kept_columns(costs: Mapping[str, Cost], family: Family) -> int:
    """Returns the elements that adapters keep per token; layers of one input share columns."""
    together: dict[tuple[str, tuple[str, ...]], int] = {}
    for name, cost in costs.items():
        parent, _, last = name.rpartition(".")
        group = parent, family.together_with(last)
        together[group] = together.get(group, 0) + cost.kept
    return sum(map(padded_rank, together.values()))


def _bytes(tree: Any) -> float:
    """Returns what the arrays of a tree take on the device."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not isinstance(leaf, HostArray)]
    return float(sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves))


def _last(fits) -> int:
    """Returns the largest n ≥ 0 for which ``fits(n)``, which holds up to there and not beyond."""
    if not fits(1):
        return 0
    high = 1
    while fits(2 * high):
        high *= 2
    low = high
    high = 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
