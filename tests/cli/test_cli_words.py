"""The words of a command line: what is suggested for a wrong one, help, and completion."""

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lorax.cli.main import main
from lorax.cli.parser import _SHELLS, make_parser, parse
from lorax.cli.plan import choose_gpu
from lorax.system.gpus import find_gpu
from lorax.system.signals import STOPPED_STATUS
from lorax.system.watchdog import STUCK_STATUS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ends(capsys):
    """Parses words that end the process; returns the status and what was printed."""

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            main(words)
        return stop.value.code, " ".join("".join(capsys.readouterr()).split())

    return run


@pytest.mark.parametrize(
    "words, suggestion",
    [
        (["trian", "run.yaml"], "lorax: error: 'trian' is no command (did you mean train?): the"),
        (["exprot"], "'exprot' is no command (did you mean export?): the commands are train, "),
        (["tomato"], "'tomato' is no command: the commands are train, validate, inspect, plan, "),
        (["train", "run.yaml", "--resum"], "unrecognized arguments: --resum (did you mean --resu"),
        (["train", "run.yaml", "--resumé", "lora.r=8"], "arguments: --resumé (did you mean --res"),
        (["generate", "x", "--temprature=1"], "--temprature=1 (did you mean --temperature?)"),
        (["plan", "run.yaml", "--zzz"], "lorax plan: error: unrecognized arguments: --zzz"),
    ],
)
def test_a_word_that_is_not_known_is_told_with_the_nearest(ends, words, suggestion):
    status, printed = ends(*words)
    assert status == 2 and suggestion in printed


def options():
    for name, command in make_parser()[1].items():
        for action in command._actions:
            if not isinstance(action, argparse._HelpAction):
                yield pytest.param(
                    action, id=f"{name} {(action.option_strings or [action.dest])[0]}"
                )


@pytest.mark.parametrize("action", list(options()))
def test_every_argument_has_a_help_text_and_every_option_its_default(action):
    assert action.help
    if action.option_strings:
        assert ("(needed)" if action.required else "(default: ") in action.help
    if action.default not in (None, False, "never", []):
        assert "%(default)s" in action.help


def test_help_of_train_names_every_exit_status(ends):
    status, printed = ends("train", "--help")
    assert status == 0
    listed = [
        int(number) for number in re.findall(r" (\d+) (?=[a-z])", printed.split("status:")[1])
    ]
    assert listed == [0, 1, 2, STUCK_STATUS, STOPPED_STATUS]
    document = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    documented = [int(number) for number in re.findall(r"^\| (\d+) \|", document, re.M)]
    assert documented == [*listed, 130]  # with 130 no command ends that trains


@pytest.mark.parametrize("command", make_parser()[1])
def test_no_line_of_help_is_longer_than_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, make_parser()[1][command].format_help().splitlines())) <= 80


def test_settings_may_be_left_out_and_options_stand_between_them(ends):
    assert parse(["validate", "run.yaml"]).overrides == []
    status, printed = ends("validate")
    assert status == 2 and printed.endswith("the following arguments are required: config")
    parsed = parse(["plan", "run.yaml", "lora.r=8", "--gpu", "h100", "train.seed=1"])
    assert (parsed.config, parsed.gpu) == ("run.yaml", "h100")
    assert parsed.overrides == ["lora.r=8", "train.seed=1"]


@pytest.mark.parametrize(
    "words, resume",
    [
        (["--resume", "run.yaml", "lora.r=8"], "always"),
        (["run.yaml", "--resume", "lora.r=8"], "always"),
        (["run.yaml", "lora.r=8", "--resume"], "always"),
        (["run.yaml", "--resume", "auto", "lora.r=8"], "auto"),
        (["run.yaml", "--verbose", "lora.r=8", "--resume=auto"], "auto"),
        (["run.yaml", "lora.r=8"], "never"),
    ],
)
def test_resume_takes_its_own_words_only(words, resume):
    parsed = parse(["train", *words])
    assert (parsed.resume, parsed.config, parsed.overrides) == (resume, "run.yaml", ["lora.r=8"])


@pytest.mark.parametrize("shell", _SHELLS)
def test_a_shell_is_told_the_commands_and_their_options(shell, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("train", "validate", "inspect", "plan", "generate", "export", "resume", "gpu"):
        assert word in script


def test_bash_completes_commands_options_and_choices(tmp_path, capsys):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    (tmp_path / "lorax.sh").write_text(capsys.readouterr().out)

    def complete(*words):
        line = " ".join(f"'{word}'" for word in words)
        script = (
            f". {tmp_path}/lorax.sh; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
            "$(complete -p lorax | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); echo ${COMPREPLY[@]}"
        )
        done = subprocess.run([bash, "-c", script], capture_output=True, text=True, cwd=tmp_path)
        return done.stdout.split()

    assert complete("lorax", "tr") == ["train"]
    assert complete("lorax", "export", "--fo") == ["--format"]
    assert complete("lorax", "export", "--format", "peft-") == ["peft-portable"]
    (tmp_path / "mine.yaml").touch()
    assert complete("lorax", "train", "mi") == ["mine.yaml"]


def test_plan_says_first_which_gpu_it_is_for(capsys):
    config = str(ROOT / "configs" / "tiny_cpu.yaml")
    model = f"model.name_or_path={ROOT / 'examples' / 'tiny' / 'model'}"
    for words, first in (
        (["--gpu", "RTX 4090"], "GPU: RTX 4090, 24 GB, as asked"),
        ([], "GPU: NVIDIA H200, 141 GB, the default where there is none (--gpu NAME: another)"),
    ):
        assert main(["plan", config, *words, model]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == first and all(len(line) <= 80 for line in lines)
    assert main(["plan", config, model, "--gpu", "h300"]) == 2
    said = capsys.readouterr().err
    assert (
        "lorax plan: error: --gpu: 'h300' is not in the table of GPUs (did you mean h200?)" in said
    )


@pytest.mark.parametrize(
    "here, gib, title, reason",
    [
        (find_gpu("l40s"), 40.0, "NVIDIA L40S", "the one here (--gpu NAME: another)"),
        (None, 15.2, "cpu", "the one here; its speed is not known, so times are an H200's"),
    ],
)
def test_plan_is_for_the_gpu_here_and_its_memory(monkeypatch, here, gib, title, reason):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr("lorax.cli.plan.device_gib", lambda: gib)
    monkeypatch.setattr("lorax.cli.plan.local_gpu", lambda: here)
    target = choose_gpu(None)
    assert (target.gib, target.gpu.title, target.reason) == (gib, title, reason)
    assert target.gpu.gb == (48 if here else 16)
    assert choose_gpu("h100").gpu.name == "h100"
