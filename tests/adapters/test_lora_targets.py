"""Target matching against the installed PEFT, case by case, and what PEFT lets pass silently."""

import re

import pytest
import torch
from flax import nnx
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorax.adapters import patterns, targets
from lorax.adapters.nnx.apply import targets_of
from lorax.adapters.targets import TargetError, match_targets
from lorax.config.adapter import LoraConfig

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
SUFFIXES = [
    ["q_proj"],
    ["q_proj", "v_proj"],
    ATTENTION,
    MLP,
    ATTENTION + MLP,
    ["self_attn.q_proj"],
    ["mlp.down_proj", "o_proj"],
    ["lm_head"],
    ["lm_head", "q_proj"],
    ["model.layers.0.self_attn.q_proj"],
    ["model.layers.11.self_attn.q_proj"],
    ["layers.1.self_attn.q_proj"],
    ["0.self_attn.q_proj", "1.mlp.up_proj"],
    ["model.layers.2.mlp.gate_proj", "v_proj"],
]
REGEXES = [
    r".*q_proj",
    r".*\.(q|v)_proj",
    r"model\.layers\.[02]\.self_attn\.k_proj",
    r"model.layers.1.*_proj",
    r".*layers\.1\..*_proj",
    r".*\.mlp\..*_proj",
    r"lm_head",
    r".*(lm_head|q_proj)",
    r"model\.layers\.\d+\.mlp\.(gate|up)_proj",
    r"(?i).*Q_PROJ",
    r".*\.layers\.(1[01]|0)\.self_attn\.[qkv]_proj",
    r"^model\.layers\.3\.self_attn\.o_proj$",
]
CASES = [
    *({"target_modules": t} for t in SUFFIXES),
    *({"target_modules": t} for t in REGEXES),
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-LINEAR"},
    # exclusions
    {"target_modules": ATTENTION, "exclude_modules": ["k_proj"]},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj", "o_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    {"target_modules": ATTENTION, "exclude_modules": ["model.layers.1.self_attn.q_proj"]},
    {"target_modules": ATTENTION, "exclude_modules": ["1.self_attn.q_proj"]},
    {"target_modules": r".*_proj", "exclude_modules": r".*\.mlp\..*"},
    {"target_modules": r".*_proj", "exclude_modules": ["gate_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": r"model\.layers\.[1-9].*"},
    {"target_modules": MLP, "exclude_modules": r".*\.(2|3)\.mlp\.up_proj"},
    # layer ranges
    {"target_modules": ["q_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj"], "layers_to_transform": 11},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": MLP, "layers_to_transform": [0, 2, 3]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
    {"target_modules": MLP, "layers_to_transform": [2], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["v_proj"], "layers_to_transform": [3], "layers_pattern": "model.layers"},
    {
        "target_modules": ["v_proj", "model.layers.5.self_attn.q_proj"],
        "layers_to_transform": [3],
    },
    {
        "target_modules": ATTENTION,
        "layers_to_transform": [0, 1],
        "exclude_modules": ["o_proj"],
    },
    {
        "target_modules": ["self_attn.q_proj"],
        "layers_to_transform": [4, 5],
        "exclude_modules": r".*\.5\..*",
    },
    # fully trained modules never carry an adapter
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]},
    {"target_modules": MLP, "modules_to_save": ["layers.0.mlp.up_proj"]},
    {"target_modules": r".*_proj", "modules_to_save": ["layers.3.self_attn"]},
    # patterns
    {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}},
    {"target_modules": ATTENTION, "rank_pattern": {r".*\.0\..*": 2, "q_proj": 3}},
    {"target_modules": ATTENTION, "alpha_pattern": {"k_proj": 32}},
    {
        "target_modules": ATTENTION,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 5},
    },
    {"target_modules": "all-linear", "rank_pattern": {"mlp.up_proj": 5, "up_proj": 3}},
    {"target_modules": "all-linear", "rank_pattern": {"(up|gate)_proj": 5}},
    {"target_modules": ATTENTION, "rank_pattern": {r"^model\.layers\.2\..*": 3}},
    {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"o_proj": 4}},
    {
        "target_modules": "all-linear",
        "use_rslora": True,
        "alpha_pattern": {r"layers\.(1|2)\.mlp\..*": 7, "q_proj": 9},
        "rank_pattern": {r"layers\.(1|2)\..*": 3, ".*_proj": 6},
    },
    {"target_modules": r".*\.q_proj", "rank_pattern": {r"model.layers.1.self_attn.q_proj": 1}},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "alpha_pattern": {"q_proj": 3}},
    {
        "target_modules": ["down_proj"],
        "rank_pattern": {"11.mlp.down_proj": 6, "1.mlp.down_proj": 7},
    },
]


@pytest.fixture(scope="module")
def torch_model():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return lambda: LlamaForCausalLM(config)


def names_of(model):
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    others = [n for n, m in model.named_modules() if n and not isinstance(m, torch.nn.Linear)]
    return linear, others


def ours(model, settings):
    linear, others = names_of(model)
    return match_targets(linear, others, LoraConfig(**settings), left_out={"lm_head"})


def test_there_are_at_least_sixty_cases():
    assert len(CASES) >= 60


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_agrees_with_peft(settings, torch_model):
    model = torch_model()
    expected = ours(model, settings)
    peft_model = get_peft_model(model, PeftLoraConfig(r=16, lora_alpha=16, **_lists(settings)))
    adapted = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in peft_model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    assert {t.name: (t.r, pytest.approx(t.scale)) for t in expected} == adapted


def _lists(settings):
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"target_modules": ["q_porj"]},
            "'q_porj' matches no linear module.*did you mean .*q_proj",
        ),
        ({"target_modules": ["q_proj", "nope"]}, "'nope' matches no linear module"),
        ({"target_modules": "q_proj"}, "'q_proj' matches no linear module.*did you mean .*q_proj"),
        ({"target_modules": ["proj"]}, "'proj' matches no linear module"),
        ({"target_modules": ["mlp"]}, "mlp.*only layers that multiply"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.*modules_to_save"),
        ({"target_modules": r".*norm"}, "norm.*only layers that multiply"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
            "leave no module to adapt",
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": ["zzz"]}, "exclude_modules: 'zzz'"),
        ({"target_modules": ["q_proj"], "exclude_modules": r"zzz.*"}, "exclude_modules: 'zzz"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 12]}, "layer 12; .*0, 1, 2"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}}, "rank_pattern: 'k_proj'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"x": 2}}, "alpha_pattern: 'x'"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["haed"]},
            "'haed'.*did you mean lm_head",
        ),
    ],
    ids=str,
)
def test_nothing_stays_unmatched(settings, message, torch_model):
    with pytest.raises(TargetError, match=message):
        ours(torch_model(), settings)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"target_modules": ["q_proj", "q_porj"]}, "q_proj"),
        ({"target_modules": ["q_porj", "k_proj", "q_proj"]}, "q_proj"),
        ({"target_modules": ["q_proj", "self_attn.q_porj"]}, "self_attn.q_proj"),
        (
            {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2, "q_porj": 2}},
            "q_proj",
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_proj", "k_porj"]}, "k_proj"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "lm_haed"]}, "lm_head"),
    ],
    ids=str,
)
def test_what_is_listed_already_is_not_proposed(settings, missing, torch_model):
    with pytest.raises(TargetError, match="matches no ") as caught:
        ours(torch_model(), settings)
    proposed = re.findall(r"[\w.]+", str(caught.value).partition("did you mean ")[2])
    assert missing not in proposed


HANGS = r"((a|[a-z_.0-9]+)+)+!"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "setting, settings",
    [
        ("target_modules", {"target_modules": HANGS}),
        ("exclude_modules", {"target_modules": ["q_proj"], "exclude_modules": HANGS}),
        ("rank_pattern", {"target_modules": ["q_proj"], "rank_pattern": {HANGS: 4}}),
        ("alpha_pattern", {"target_modules": ["q_proj"], "alpha_pattern": {HANGS: 4.0}}),
        ("modules_to_save", {"target_modules": ["q_proj"], "modules_to_save": [HANGS]}),
        (
            "layers_pattern",
            {
                "target_modules": ["q_proj"],
                "layers_pattern": [HANGS],
                "layers_to_transform": [0],
            },
        ),
    ],
)
def test_a_pattern_that_would_never_end_is_refused_by_its_setting(setting, settings, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1)
    monkeypatch.setattr(targets, "SECONDS", 1)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    expected = rf"lora.{setting}: matching .* takes more than 1 s; repeat fewer things"
    with pytest.raises(TargetError, match=expected):
        match_targets(names, ["model", "model.layers"], LoraConfig(**settings))


@pytest.mark.parametrize("setting", ["modules_to_save", "layers_pattern"])
def test_an_entry_that_is_no_pattern_is_refused_by_its_setting(setting):
    config = LoraConfig(target_modules=["q_proj"], **{setting: ["["], "layers_to_transform": [0]})
    with pytest.raises(TargetError, match=rf"lora.{setting}: '\[' is no regular expression"):
        match_targets(["model.layers.0.q_proj"], ["model"], config)


def test_a_process_is_started_only_for_what_may_be_slow(monkeypatch):
    started = []
    monkeypatch.setattr(patterns.subprocess, "run", lambda *a, **_: started.append(a))
    config = LoraConfig(
        target_modules=["q_proj"], rank_pattern={"layers.0.q_proj": 4}, modules_to_save=["head"]
    )
    match_targets(["model.layers.0.q_proj"], ["model.head"], config)
    assert not started


def test_layers_that_are_not_there_are_named_and_not_the_targets():
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[7])
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    expected = r"layers_to_transform: no target module lies in layer 7; .* layers are 0, 1"
    with pytest.raises(TargetError, match=expected):
        match_targets(names, ["model"], config)


@pytest.mark.timeout(60)
def test_no_way_into_the_matching_goes_past_the_limit():
    model = nnx.eval_shape(
        lambda: nnx.Dict(q_proj_of_a_long_name_indeed=nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    )
    with pytest.raises(TargetError, match=r"lora.target_modules: matching .* more than 2 s"):
        targets_of(model, LoraConfig(target_modules=HANGS))
