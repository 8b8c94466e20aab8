"""What a run that learned little advises, and that each setting it names is accepted."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorax.cli.main import main
from lorax.config.run import load_config
from lorax.data.chat.tokenizer import load_tokenizer
from lorax.data.dataset import EncodedDataset
from lorax.report.advice import advise, list_remedies, tokenizer_notes
from lorax.report.screen import RunSummary, print_summary
from lorax.runs.checks import check_targets
from lorax.runs.model import Blueprint
from tests.tiny import TINY, shallow_model, write_model

UNTIED = "untied"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {"tied": TINY / "model", UNTIED: write_model(tmp_path_factory.mktemp("base") / UNTIED)}


@pytest.fixture
def settings(folders, tmp_path):
    """Makes the config of a run of one of the models; what overrides it comes last."""

    def make(*overrides, base="tied"):
        path = tmp_path / "run.yaml"
        sections = {"model": {"name_or_path": str(folders[base]), "dtype": "float32"}}
        sections |= {"data": {"train": "rows.jsonl"}, "save": {"output_dir": str(tmp_path / "run")}}
        path.write_text(json.dumps(sections))
        return load_config(path, overrides)

    return make


@pytest.fixture
def advice(settings, tmp_path):
    """Advises a run that logged these losses."""

    def ask(train, held_out=(), overrides=(), base="tied"):
        rows = [{"step": 0, "eval_loss": held_out[0]}] if held_out else []
        rows += [{"step": i, "loss": loss} for i, loss in enumerate(train, start=1)]
        rows += [{"step": len(train), "eval_loss": loss} for loss in held_out[1:]]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        config = settings(*overrides, base=base)
        return "".join(advise(config, tmp_path, Blueprint.of(config).architecture))

    return ask


FALLING = list(np.linspace(3, 1, 20))


def test_a_loss_that_fell_needs_no_advice(advice):
    assert advice(FALLING, [3, 1.2]) == advice(FALLING) == ""


@pytest.mark.parametrize("held_out", [[3, 2.99], []])
def test_a_flat_loss_names_what_to_try(advice, held_out):
    said = advice([3.0] * 20, held_out, ["lora.target_modules=[q_proj]"])
    which = "held-out loss did not fall (3.0000 → 2.9900)" if held_out else "training loss did not"
    assert which in said
    for setting in ("learning_rate=6.0e-04", "all-linear", "lora.modules_to_save=[embed_tokens],"):
        assert setting in said


def test_losses_that_differ_from_batch_to_batch_do_not_ask_for_a_lower_rate(advice):
    noisy = [3.0] * 32 + [3.2] * 8  # 7 % above the first ones
    for held_out in ([3.0, 2.999], []):
        said = advice(noisy, held_out)
        assert "did not fall" in said and "learning_rate=6.0e-04" in said
        assert "made it worse" not in said
    assert "made it worse: try train.learning_rate=6.7e-05" in advice(noisy, [3.0, 3.2])


def test_a_run_that_logged_few_of_its_steps_is_advised_by_them(settings, tmp_path):
    def advised(steps):
        rows = [{"step": step, "loss": 3.0} for step in steps]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        config = settings()
        return advise(config, tmp_path, Blueprint.of(config).architecture)

    assert advised(range(10, 160, 10))
    assert not advised(range(1, 20)) and not advised((10, 20, 30, 40))


def test_a_held_out_loss_that_rose_alone_is_not_called_flat(advice):
    said = advice(FALLING, [3, 3.5])
    assert "learned by heart" in said and "learning_rate" not in said


def test_training_that_made_it_worse_wants_smaller_steps(advice):
    assert advice(FALLING[::-1], [1, 3]).endswith("made it worse: try train.learning_rate=6.7e-05")


def test_a_base_that_does_worse_than_guessing_has_its_embedding_trained(advice):
    losses = [10.0, *[4.0] * 19]
    said = advice(losses, [10.3, 4.1])
    assert "guessing among all 512 tokens gives 6.24" in said
    assert "Try lora.modules_to_save=[embed_tokens]," in said
    assert advice(losses, [10.3, 4.1], ["lora.modules_to_save=[embed_tokens]"]) == ""
    assert advice(losses, [10.3, 0.05]) == ""


def test_short_runs_and_rows_that_were_known_get_none(advice):
    assert advice([3.0] * 19, [3, 3]) == advice([0.05] * 20, [0.05, 0.05]) == ""


def test_a_log_that_is_gone_or_damaged_is_no_error(settings, tmp_path):
    config = settings()
    assert advise(config, tmp_path, Blueprint.of(config).architecture) == ()
    (tmp_path / "metrics.jsonl").write_text("torn\n")
    assert advise(config, tmp_path, Blueprint.of(config).architecture) == ()


@pytest.mark.parametrize("base", ["tied", UNTIED])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.learning_rate=2e-3", "train.max_steps=50"],
        ["train.learning_rate=2e-3"],
        ["lora.target_modules=[q_proj, lm_head]"],
        ["lora.target_modules=.*(q_proj|lm_head)"],
        ["lora.target_modules=[q_proj]", "lora.layers_to_transform=[0]"],
        ["save.export=[peft-portable, merged]"],
        ["save.export=[peft-portable]"],
        ["model.offload_embedding=true"],
        ["train.method=full"],
        ["lora.modules_to_save=[norm]"],
    ],
    ids=str,
)
def test_each_setting_that_is_named_is_accepted(settings, base, overrides):
    if base == "tied" and ("offload" in str(overrides) or "lm_head" in str(overrides)):
        pytest.skip("a tied head is no layer of its own")
    config = settings(*overrides, base=base)
    remedies = list(list_remedies(config, Blueprint.of(config).architecture))
    assert remedies
    for remedy in remedies:
        words = remedy.split(", which")[0].split(" ")
        changed = settings(*overrides, *words, base=base)
        assert changed != config
        check_targets(Blueprint.of(changed))


def test_the_summary_shows_it():
    console = Console(file=io.StringIO(), width=200)
    print_summary(console, RunSummary(steps=1, seconds=1, advice=("Try [more].",)))
    assert "Try [more]." in console.file.getvalue()


@pytest.mark.slow
def test_a_run_that_learns_nothing_says_so_and_its_rows_are_told(tmp_path, capsys):
    row = {"messages": [{"role": "user", "content": "Får?"}, {"role": "assistant", "content": "å"}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(20 * (json.dumps(row) + "\n"))
    config = tmp_path / "run.yaml"
    sections = {"model": {"name_or_path": str(shallow_model()), "dtype": "float32"}}
    sections |= {"data": {"train": str(rows), "max_seq_length": 64}}
    sections |= {"train": {"learning_rate": 1e-9, "per_device_train_batch_size": 1}}
    sections |= {"save": {"output_dir": str(tmp_path / "run")}}
    config.write_text(json.dumps(sections))
    assert main(["train", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "of the tokens are single bytes" in printed
    (said,) = json.loads((tmp_path / "run" / "summary.json").read_text())["advice"]
    assert "lora.modules_to_save=[embed_tokens]" in said
    assert said in printed


# What the tokenizer does not know.


def encoded(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    return {"train": EncodedDataset.from_rows([(ids, np.ones(len(ids), bool))])}


def test_bytes_of_unknown_characters_are_told_once_there_are_many():
    tokenizer = load_tokenizer(str(TINY / "model"))
    (note,) = tokenizer_notes(encoded(tokenizer, "får å" * 20), tokenizer)
    assert "% of the tokens are single bytes of characters" in note
    plain = "The shovel is green, made of glass. " * 10
    assert not list(tokenizer_notes(encoded(tokenizer, plain), tokenizer))
    assert not list(tokenizer_notes(encoded(tokenizer, plain + "å"), tokenizer))


def test_unknown_tokens_are_told():
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "known": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    (note,) = tokenizer_notes(encoded(tokenizer, "known known new"), tokenizer)
    assert "1 of 3 tokens are <unk>" in note
    assert not list(tokenizer_notes(encoded(tokenizer, "known known"), tokenizer))
