"""Inputs of every kind, changed at random: refused clearly, or rightly used; the short run.

The long run is by hand: `python -m tests.fuzz`.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.fuzz import edits, structure
from tests.fuzz.__main__ import make_garden, run_cases
from tests.fuzz.argue import argue
from tests.fuzz.edits import Edit
from tests.fuzz.judge import ACCEPTED, FAULT, REFUSED, judge
from tests.fuzz.kinds import KINDS, Case, read_cases
from tests.fuzz.pool import Outcome

FOUND = Path(__file__).parent / "found.jsonl"
"""What was a fault once."""

SEEDS = range(16)
SECONDS = 240.0
"""By the clock: the machine may be busy. Of the processor a case has 20."""


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_changed_inputs_are_refused_clearly_or_rightly_used(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as conftest has it
    garden = make_garden(tmp_path)
    drawn = [(kind, seed) for seed in SEEDS for kind in KINDS]
    rows = list(run_cases([*read_cases(FOUND), *drawn], tmp_path, garden, SECONDS, workers=1))
    faults = [row for row in rows if row["verdict"] == FAULT]
    assert not faults, "\n".join(json.dumps(row) for row in faults)
    verdicts = [row["verdict"] for row in rows]
    assert verdicts.count(REFUSED) > len(rows) / 4  # the changes do reach what reads the inputs
    assert verdicts.count(ACCEPTED) > len(rows) / 20


CASE = Case(
    "config", 0, "plain", ("validate", "run.yaml"), (Edit("run.yaml", "delete", ["lora", "r"]),)
)
CLEAR = Outcome(2, err="lorax validate: error: run.yaml:7: lora.r: needs a whole number\n")
FAULTS = {
    "what escapes": ({"error": "Traceback\nRuntimeError: no"}, "escaped: RuntimeError: no"),
    "another status": ({"status": 3}, "exit status 3"),
    "words of the inside": ({"err": CLEAR.err + "'NoneType' object"}, "says 'NoneType'"),
    "text of rows": ({"err": CLEAR.err + "zqask"}, "shows text of the rows"),
    "much time": ({"cpu_seconds": 21.0}, "took 21 s of the processor"),
    "much memory": ({"peak_mib": 2049.0}, "took 2,049 MiB"),
    "something written": ({"changed": ["run/config.yaml"]}, "changed run/config.yaml"),
    "a long message": ({"err": CLEAR.err + "long " * 500}, "a message of 2,"),
    "no place": ({"err": "lorax validate: error: needs a whole number\n"}, "names no place"),
    "no error": ({"err": "run.yaml is odd"}, "0 errors where one is needed"),
    "more than an error": ({"err": "Warning: x\n" + CLEAR.err}, "says more than its error"),
    "what nothing argues": ({"status": 0, "err": ""}, "nothing says why"),
    "an input changed": (
        {"status": 0, "reason": "x", "changed": ["rows.jsonl"]},
        "changed rows.jsonl",
    ),
}


def test_a_clear_refusal_and_an_argued_acceptance_are_no_faults():
    assert judge(CASE, CLEAR) == (REFUSED, [])
    assert judge(CASE, Outcome(0, reason="the default")) == (ACCEPTED, [])


@pytest.mark.parametrize("name", FAULTS)
def test_the_judge_notices(name):
    changes, wrong = FAULTS[name]
    verdict, found = judge(CASE, dataclasses.replace(CLEAR, **changes))
    assert verdict == FAULT
    assert any(text.startswith(wrong) for text in found), found


BESIDE = {
    "a word of the language": (
        dataclasses.replace(CASE, edits=(Edit("model/config.json", "set", ["dtype"], 7),)),
        "the model is of no known kind",
        "model/config.json: dtype must be text",
    ),
    "a colon": (
        dataclasses.replace(CASE, kind="command line", edits=(Edit("words", "add", [], "--x=8"),)),
        "it cannot be used: needs text",
        "unrecognized arguments: --x=8",
    ),
    "a part of a word": (
        dataclasses.replace(CASE, edits=(Edit("run.yaml", "set", ["lora", "alpha"], 7),)),
        "the alphabet is odd",
        "the value of lora.alpha is odd",
    ),
    "a value of one letter": (
        dataclasses.replace(CASE, kind="command line", words=("generate", "a"), edits=()),
        "a folder is missing",
        "a: no such folder",
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_place_is_a_part_of_the_case_and_no_word_like_it(name):
    case, vague, clear = BESIDE[name]
    said = lambda text: dataclasses.replace(CLEAR, err=f"lorax validate: error: {text}\n")
    verdict, found = judge(case, said(vague))
    assert verdict == FAULT and found[0].startswith("names no place")
    assert judge(case, said(clear)) == (REFUSED, [])


def write_adapter(folder, value=1.0):
    """Writes an adapter of rank 2 on one module."""
    tensors = {"q.lora_A.weight": np.ones((2, 3)), "q.lora_B.weight": np.full((4, 2), value)}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture
def run_of_garden(tmp_path, monkeypatch):
    """A sound run in a garden, and a copy of it in the folder of a case."""
    monkeypatch.setenv("FUZZ_GARDEN", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    adapter = tmp_path / "run" / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 8}')
    write_adapter(adapter)
    (adapter.parent / "summary.json").write_text("{}")
    return Path(shutil.copytree(tmp_path / "run", tmp_path / "case"))


ADDS = "the exported adapter adds what the adapter does"
BITS = "the adapter has the bits of the run that nothing was done to"
ANSWERS = "the adapter that answers has the bits of the run that nothing was done to"


def test_an_answer_of_a_run_is_argued_by_the_adapter_that_gave_it(run_of_garden):
    case = Case("run folder", 0, "run", ("generate", "run", "--prompt", "zq"), ())
    assert argue(case, run_of_garden, "an answer") == ANSWERS
    write_adapter(run_of_garden / "run/adapter", 2.0)
    assert argue(case, run_of_garden, "an answer") is None


def test_an_export_of_a_run_is_argued_by_its_tensors(run_of_garden):
    words = ("export", "run", "--format", "peft", "--out", "out")
    for kind in ("run folder", "command line"):
        case = Case(kind, 0, "run", words, ())
        out = Path(shutil.copytree(run_of_garden / "run/adapter", run_of_garden / "out"))
        assert argue(case, run_of_garden, "") == ADDS
        write_adapter(out, 2.0)
        assert argue(case, run_of_garden, "") is None
        (out / "adapter_config.json").write_text('{"lora_alpha": 4}')  # half of twice as much
        assert argue(case, run_of_garden, "") == ADDS
        (out / "adapter_model.safetensors").unlink()
        assert argue(case, run_of_garden, "") is None
        shutil.rmtree(out)


def test_a_run_that_trained_is_argued_by_its_bits(run_of_garden):
    for kind, more in (("run folder", ()), ("run folder", ("--resume",)), ("command line", ())):
        case = Case(kind, 0, "run", ("train", "run.yaml", *more), ())
        assert argue(case, run_of_garden, "") == BITS
        path = run_of_garden / "run/adapter/adapter_model.safetensors"
        before = path.read_bytes()
        write_adapter(path.parent, 2.0)
        assert argue(case, run_of_garden, "") is None
        path.write_bytes(before)


DOCUMENT = '{"a": [1, {"b": 2}], "c": null}'
CHANGES = {
    '{"a": [1, {"b": NaN}], "c": null}': Edit("x.json", "set", ["a", 1, "b"], {"raw": "NaN"}),
    '{"a": [{"b": 2}], "c": null}': Edit("x.json", "delete", ["a", 0]),
    '{"A": [1, {"b": 2}], "c": null}': Edit("x.json", "rename", ["a"], "A"),
    '{"a": [1, {"b": 2}], "c": null, "c": null}': Edit("x.json", "twice", ["c"]),
    '{"a": [1, {"b": 2, "d": []}], "c": null}': Edit("x.json", "add", ["a", 1], ["d", []]),
    '{"a": [1, {"b"': Edit("x.json", "cut", [14]),
    '{"\\ud800": 0}': Edit("x.json", "set", [], {"\ud800": 0}),
}


@pytest.mark.parametrize("after", CHANGES)
def test_an_edit_does_what_it_says(after, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(DOCUMENT)
    edits.apply(tmp_path, CHANGES[after])
    assert path.read_text() == after
    again = Case.from_json(
        json.loads(json.dumps(dataclasses.replace(CASE, edits=(CHANGES[after],)).to_json()))
    )
    assert again.edits[0].value == CHANGES[after].value


def test_long_repetitions_are_told_shortly():
    edit = Edit("x.json", "set", ["a"], ["a" + "bc" * 5000 + "d" * 99 + "e", {"raw": "[" * 2000}])
    case = dataclasses.replace(CASE, edits=(edit,))
    text = json.dumps(case.to_json())
    assert len(text) < 500
    assert Case.from_json(json.loads(text)).edits[0].value == edit.value


def test_what_is_not_changed_is_written_as_it_was():
    for name, text in {
        "x.json": DOCUMENT,
        "x.jsonl": '{"a": 1}\n{"a": [true, "\\u00e9"]}\n',
        "x.yaml": 'a: 1\nb:\n  c: "x"\n  d: [1.5, null]\n',
    }.items():
        data = text.encode()
        assert structure.write(name, structure.read(name, data), data) == data
