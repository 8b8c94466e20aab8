"""The words of a command line: which commands and options there are, and what each means."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, override

from lorax.cli.check import inspect, validate
from lorax.cli.export import add_export
from lorax.cli.generate import add_generate
from lorax.cli.plan import plan
from lorax.cli.train import train
from lorax.system.gpus import GPUS
from lorax.system.versions import find_version
from lorax.system.wording import LONGEST, clip_words, did_you_mean

_RESUME = ("always", "auto")

_SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
_FILES = ("config",)
_FOLDERS = ("source", "out", "base", "model", "adapter")

_STATUS = """\
exit status:
  0    done
  1    the run failed: a number that is not finite, memory, a checkpoint that
       cannot be written
  2    an input cannot be used
  70   no step ended for train.stuck_after_seconds
  75   stopped by SIGTERM, SIGHUP or Ctrl-C; what was reached is saved: go on
       with --resume auto
"""

_COMPLETION = """\
Completion of commands, options and files, for bash (or zsh, fish, tcsh, powershell):
  eval "$(lorax --print-completion bash)"     # a line for ~/.bashrc
"""


class _Parser(argparse.ArgumentParser):
    """Parses words, and shows long ones clipped."""

    def __init__(self, **settings: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings
        )

    @override
    def error(self, message: str) -> NoReturn:
        super().error(clip_words(message, LONGEST))


class _PrintCompletion(argparse.Action):
    """Prints a shell's script, made by shtab, and ends the process."""

    @override
    def __call__(self, parser: argparse.ArgumentParser, _: Any, values: Any, option: Any = None):
        import shtab  # needed here alone

        top, commands = make_parser()
        for command in commands.values():
            for action in command._actions:
                if action.dest in (*_FILES, *_FOLDERS):
                    kind = shtab.FILE if action.dest in _FILES else shtab.DIRECTORY
                    action.complete = kind  # type: ignore[attr-defined]
        print(shtab.complete(top, values))
        parser.exit()


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns what a command line asks for; its `run` takes it and a console.

    Options may stand before, between and after settings. Ends the process with status 2 where a
    word is not known, and 0 after help.

    Args:
        words: After ``lorax``.
    """
    parser, commands = make_parser()
    name, *rest = words or [""]
    if name not in commands:
        if name and not name.startswith("-"):
            near = did_you_mean(name, commands)
            parser.error(f"{name!r} is no command{near}: the commands are {', '.join(commands)}")
        return parser.parse_args(words)
    command = commands[name]
    parsed, unknown = command.parse_known_intermixed_args(_fill_resume(rest))
    if unknown:
        # What follows an option that is not known is left over with it.
        unknown = [word for word in unknown if word.startswith("-")] or unknown
        options = [option for action in command._actions for option in action.option_strings]
        near = did_you_mean(unknown[0].partition("=")[0], options)
        command.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    return parsed


def _fill_resume(words: Sequence[str]) -> list[str]:
    """Gives a bare --resume its value, so that it does not take the word after it for one."""
    filled = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        is_bare = word == "--resume" and following not in _RESUME
        filled.append("--resume=always" if is_bare else word)
    return filled


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser of all words, and those of the commands by their names."""
    parser = _Parser(
        prog="lorax",
        description="LoRA fine-tuning of language models in JAX.",
        epilog=_COMPLETION,
    )
    version = f"lorax {find_version()}"
    parser.add_argument("--version", action="version", version=version, help="print it, and exit")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=_SHELLS,
        help="print what completes lorax's words in a shell, and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, run: Callable[..., None], text: str, **settings: Any) -> _Parser:
        command = commands.add_parser(name, help=text, description=text, **settings)
        command.set_defaults(run=run, command=name)
        return command

    for command in (
        add("train", train, "Fine-tune a model, export it, verify the export.", epilog=_STATUS),
        add(
            "validate",
            validate,
            "Check a config, its data, its targets and the files of the weights.",
        ),
        add("inspect", inspect, "Show the adapted modules and rendered rows with their loss mask."),
        add("plan", plan, "Predict memory and time of a step; reads no weights and no data."),
    ):
        _add_settings(command)
    add_generate(add)
    add_export(add)
    _add_options(commands.choices)
    return parser, dict(commands.choices)


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="a YAML file, such as configs/tiny_cpu.yaml")
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings in the place of the file's, such as lora.r=8 (default: the file's)",
    )


def _add_options(commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """Adds the options of the commands that read a config."""
    commands["train"].add_argument(
        "--resume",
        choices=_RESUME,
        default="never",
        help="go on with the run in save.output_dir; `auto` begins one if there is none, and "
        "--resume alone is `always` (default: begin a run)",
    )
    for name in ("train", "inspect"):
        commands[name].add_argument(
            "--verbose",
            action="store_true",
            help="print every setting (default: those that differ from their defaults)",
        )
    commands["inspect"].add_argument(
        "--rows", type=int, default=3, help="how many rows are shown (default: %(default)s)"
    )
    names = ", ".join(gpu.name for gpu in GPUS)
    commands["plan"].add_argument(
        "--gpu",
        metavar="NAME",
        help=f"the GPU that the answer is for: {names} (default: the one here, else h200)",
    )
