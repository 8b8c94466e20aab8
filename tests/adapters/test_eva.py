"""EVA's components, ranks and first values, against PEFT's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.eva import SVDHook, get_eva_state_dict
from peft.utils.incremental_pca import IncrementalPCA

from lorax.adapters.eva import (
    adjusted_alpha,
    components_for,
    converged,
    explained_variance_ratios,
    first_values,
    no_directions,
    redistribute,
    update,
)
from tests.bounds import distance

pytestmark = pytest.mark.filterwarnings("ignore")

K, C = 32, 6
CLOSE = 2e-4
"""Rounding moves a component by about 1e-7 · s₁ / (s₅ - s₆); the randomised SVD by less."""
step = jax.jit(update)


def batches(count=3, rows=40, k=K, factor=0.6, seed=0):
    """Returns rows whose variance falls by a factor from each direction to the next, and a mean."""
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(random.normal(size=(k, k)))[0]
    scales = factor ** np.arange(k)
    rows = random.normal(size=(count, rows, k)) * scales @ turn + random.normal(size=k)
    return rows.astype(np.float32)


def after(rows, components=C):
    state = no_directions(components, rows[0].shape[-1])
    for x in rows:
        state = step(state, jnp.asarray(x))
    return state


def assert_same(state, pca, close=CLOSE):
    assert int(state.seen) == int(pca.n_samples_seen_)
    assert distance(state.mean, pca.mean_) <= 1e-5
    assert distance(state.variation, (pca.var_ * pca.n_samples_seen_).sum()) <= 1e-5
    assert distance(state.singular_values, pca.singular_values_) <= close
    assert distance(explained_variance_ratios(state), pca.explained_variance_ratio_) <= close
    assert distance(state.components, pca.components_) <= close


@pytest.mark.parametrize("lowrank", [False, True], ids=["exact", "as EVA"])
@pytest.mark.parametrize("k", [8, K], ids=["exact here", "randomised here"])
def test_components_are_those_of_peft_s_incremental_pca(k, lowrank):
    rows = batches(k=k)
    pca = IncrementalPCA(n_components=C, lowrank=lowrank, lowrank_seed=42)
    state = no_directions(C, k)
    for x in rows:
        state = step(state, jnp.asarray(x))
        pca.partial_fit(torch.tensor(x))
        assert_same(state, pca)


def test_one_batch_gives_the_right_singular_vectors_of_its_centred_rows():
    x = batches(1)[0]
    state = after([x])
    centred = np.asarray(x, np.float64) - x.mean(0, dtype=np.float64)
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    assert distance(state.singular_values, s[:C]) <= CLOSE
    assert distance(np.abs(np.sum(state.components * vt[:C], axis=1)), np.ones(C)) <= CLOSE
    assert distance(explained_variance_ratios(state), s[:C] ** 2 / np.sum(s**2)) <= CLOSE


def test_rows_that_are_masked_do_not_count_whatever_they_hold():
    rows = batches(2)
    mask = np.random.default_rng(1).random((2, 40)) < 0.6
    state = no_directions(C, K)
    for x, each in zip(rows, mask, strict=True):
        state = step(state, jnp.where(each[:, None], x, jnp.inf), jnp.asarray(each))
    expected = after([x[each] for x, each in zip(rows, mask, strict=True)])
    for got, want in zip(state, expected, strict=True):
        assert distance(got, want) <= CLOSE


def test_a_batch_without_rows_changes_no_bit():
    for state in (no_directions(C, K), after(batches(1))):
        same = step(state, jnp.full((40, K), jnp.nan), jnp.zeros(40, bool))
        assert all(np.array_equal(got, want) for got, want in zip(same, state, strict=True))


def test_batches_of_fewer_rows_than_components_count_too():
    rows = batches(1, rows=40, k=8)[0]
    state = after(list(rows.reshape(20, 2, 8)), components=8)  # as many as there are: no loss
    whole = after([rows], components=8)
    assert distance(state.singular_values, whole.singular_values) <= 1e-5
    assert distance(state.variation, whole.variation) <= 1e-5


def test_bfloat16_rows_are_summed_in_float32():
    x = jnp.asarray(batches(1)[0], jnp.bfloat16)
    got, want = step(no_directions(C, K), x), step(no_directions(C, K), x.astype(jnp.float32))
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


def test_stacked_layers_are_updated_together():
    rows = batches(3)
    states = jax.vmap(lambda x: update(no_directions(C, K), x))(jnp.asarray(rows))
    for index, x in enumerate(rows):
        for got, want in zip(states, after([x]), strict=True):
            assert distance(got[index], want) <= CLOSE
    shapes = jax.eval_shape(update, no_directions(C, K), jnp.zeros((40, K)))
    assert [each.shape for each in shapes] == [(C, K), (C,), (K,), (), ()]


@pytest.mark.parametrize("tau", [0.5, 0.95, 0.99])
def test_the_components_that_peft_says_have_converged_have(tau):
    hook = SVDHook(n_components=C, sim_thresh=tau, name="layer")
    state = no_directions(C, K)
    assert not converged(state, state, 0.0).any()
    said = []
    for x in batches(5, factor=0.8):
        before, state = state, step(state, jnp.asarray(x))
        hook(None, torch.tensor(x), None)
        ours = np.asarray(converged(before, state, tau))
        # Where the largest element is another, PEFT turns the component, and takes -cos for cos.
        turned = np.sum(before.components * state.components, axis=1) < 0
        np.testing.assert_array_equal(ours[~turned], hook.converged.numpy()[~turned])
        assert not np.any(hook.converged.numpy() & ~ours)
        said.append(hook.converged.tolist())
    assert not any(said[0]) and any(said[-1])
    assert tau == 0.5 or not all(said[1])


def test_a_component_that_changed_its_sign_has_not_moved():
    state = after(batches(1))
    turned = state._replace(components=-state.components)
    assert converged(state, turned, 0.9999).all()


class Net(torch.nn.Module):
    """Linear layers whose inputs vary in a few directions, or in many; `a` and `b` read one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(24, 20), torch.nn.Linear(24, 20)
        self.middle, self.out = torch.nn.Linear(20, 28), torch.nn.Linear(28, 4)
        with torch.no_grad():
            self.middle.weight[:, 2:] *= 0.02
            self.a.weight *= 3

    def forward(self, x):
        return self.out(torch.relu(self.middle(torch.tanh(self.a(x)) + 0.1 * self.b(x))))


NAMES = ["a", "b", "middle", "out"]
PLAIN: Any = dict(
    forward_fn=lambda model, x: model(x),
    prepare_model_inputs_fn=None,
    prepare_layer_inputs_fn=None,
    show_progress_bar=False,
)


def inputs_of(net, data):
    """Returns the inputs of each layer, per batch."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    hooks = [
        getattr(net, name).register_forward_hook(
            lambda _, x, __, name=name: found[name].append(x[0].detach().numpy())
        )
        for name in NAMES
    ]
    for x in data:
        net(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(scope="module")
def data():
    # The second time, nothing moves any more, and PEFT ends.
    return 2 * [torch.tensor(batches(1, rows=64, k=24, factor=0.75)[0])]


@pytest.fixture(scope="module")
def inputs(data):
    return inputs_of(Net(), data)


def states_for(inputs, r, rho):
    return {
        name: after(rows, components_for(r, rho, rows[0].shape[1])) for name, rows in inputs.items()
    }


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("r", "rho"), [(4, 2.0), (4, 1.0), (3, 1.5), (5, 3.0)])
def test_ranks_and_first_values_are_peft_s(data, inputs, r, rho, whiten):
    eva = EvaConfig(rho=rho, whiten=whiten)
    config = LoraConfig(r=r, target_modules=NAMES, init_lora_weights="eva", eva_config=eva)
    theirs = get_eva_state_dict(Net(), data, config, **PLAIN)
    states = states_for(inputs, r, rho)
    ratios = {name: explained_variance_ratios(state) for name, state in states.items()}
    ranks = redistribute(ratios, r, rho)
    assert sum(ranks.values()) == r * len(NAMES) and list(ranks) == NAMES
    # Which of two layers with one input gets the larger rank is PEFT's sorting's chance.
    assert sorted(ranks[name] for name in "ab") == sorted(len(theirs[name]) for name in "ab")
    assert ranks["a"] >= ranks["b"]
    assert [ranks[name] for name in NAMES[2:]] == [len(theirs[name]) for name in NAMES[2:]]
    if rho > 1:
        assert len({*ranks.values()}) > 1
    # With `whiten`, PEFT divides the values that layers with one input share once for each.
    for name in NAMES[2:] if whiten else NAMES:
        shared = min(ranks[name], len(theirs[name]))
        got = first_values(states[name], shared, whiten=whiten)
        assert distance(got, theirs[name][:shared].T) <= 2e-3


@pytest.mark.parametrize("adjust", [False, True])
def test_a_model_that_peft_initialised_has_these_ranks_alphas_and_values(data, inputs, adjust):
    eva = EvaConfig(adjust_scaling_factors=adjust)
    names = ["middle", "out"]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=names, init_lora_weights="eva", eva_config=eva
    )
    model: Any = get_peft_model(Net(), config)
    initialize_lora_eva_weights(model, data, **PLAIN)
    states = states_for({name: inputs[name] for name in names}, 4, 2.0)
    ratios = {name: explained_variance_ratios(state) for name, state in states.items()}
    ranks = redistribute(ratios, 4, 2.0)
    assert ranks["middle"] != ranks["out"]
    for name, rank in ranks.items():
        layer = model.base_model.model.get_submodule(name)
        assert layer.r["default"] == rank
        alpha = adjusted_alpha(6, 4, rank) if adjust else 6
        assert layer.lora_alpha["default"] == pytest.approx(alpha)
        assert layer.scaling["default"] == pytest.approx(alpha / rank)
        assert not torch.any(layer.lora_B["default"].weight)
        a = layer.lora_A["default"].weight.detach().T
        assert distance(first_values(states[name], rank), a) <= 2e-3


def test_ranks_of_their_own_are_the_budget_and_the_bound():
    ratios = {"few": np.array([0.99, 0.001]), "many": np.full(6, 0.15), "left out": np.full(6, 0.1)}
    ranks = redistribute(ratios, {"few": 1, "many": 3, "left out": 3}, 2.0)
    assert ranks == {"few": 1, "many": 6, "left out": 0}
    assert redistribute(ratios, {"few": 2, "many": 3, "left out": 3}, 1.0) == {
        "few": 2,
        "many": 3,
        "left out": 3,
    }


def test_the_components_that_a_layer_needs_are_at_most_its_inputs():
    assert [components_for(4, 2.0, 24), components_for(3, 1.5, 24)] == [8, round(3 * 1.5)]
    assert components_for(16, 2.0, 24) == components_for(16, 1e30, 24) == 24
    with pytest.raises(ValueError, match=r"r=25 is more than the 24 .* at most 24 in rank_pattern"):
        components_for(25, 2.0, 24)
    with pytest.raises(ValueError, match=r"rho must be at least 1, got 0.5"):
        components_for(4, 0.5, 24)


def ratios_of(rows):
    return explained_variance_ratios(after(rows))


def test_inputs_that_do_not_vary_are_refused_by_name():
    good = ratios_of(batches(1))
    constant = np.tile(np.random.default_rng(0).normal(size=K).astype(np.float32), (1, 40, 1))
    for bad in (ratios_of(constant), explained_variance_ratios(no_directions(C, K))):
        with pytest.raises(ValueError, match=r"layer.7: EVA found no variance .* exclude_modules"):
            redistribute({"layer.0": good, "layer.7": bad}, 3, 2.0)
    line = np.random.default_rng(0).normal(size=(1, 40, 1)).astype(np.float32) * np.ones(K)
    with pytest.raises(ValueError, match=r"layer.7: EVA would take directions in which its inputs"):
        redistribute({"layer.0": good, "layer.7": ratios_of(line.astype(np.float32))}, 3, 1.0)
    assert redistribute({"layer.0": good}, 3, 2.0) == {"layer.0": 3}  # the remedy


def test_too_few_components_are_refused():
    state = after(batches(1))
    with pytest.raises(ValueError, match="EVA has 6 components for r=7; compute at least 7"):
        first_values(state, 7)
    with pytest.raises(ValueError, match=r"layer: EVA has 6 components for r=7; it needs"):
        redistribute({"layer": explained_variance_ratios(state)}, 7, 1.0)
    with pytest.raises(ValueError, match="rho must be at least 1, got nan"):
        redistribute({"layer": explained_variance_ratios(state)}, 3, float("nan"))
