"""``twinstream completion bash | zsh | fish``: scripts made of the parser, by which shells complete commands."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from .checks import check_choice
from .options import on_command_line
from .sampling.arguments import Options

SHELLS = ("bash", "zsh", "fish")

_BASH = """# twinstream {version}: for bash, in ~/.bashrc: eval "$(twinstream completion bash)"
_twinstream() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command="" words="" i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$command ${{COMP_WORDS[i]}}" in
            {commands}) command="$command ${{COMP_WORDS[i]}}" ;;
        esac
    done
    case "$before" in
{values}
        *)
            case "$command" in
{words}
            esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _twinstream twinstream
"""
_ZSH = '# twinstream: for zsh, in ~/.zshrc after compinit: eval "$(twinstream completion zsh)"\n'
_ZSH += "autoload -U +X bashcompinit && bashcompinit\n"


@dataclass(frozen=True, slots=True)
class _Command:
    """A command, its options with their help and whether a value follows, and the commands within it with theirs."""

    path: tuple[str, ...]
    options: list[tuple[tuple[str, ...], str, bool]]
    commands: dict[str, str]


def add_completion(parser: argparse.ArgumentParser, whole: Callable[[], argparse.ArgumentParser]) -> None:
    """Args: parser: the command's; whole: makes the parser of all commands."""
    parser.add_argument("shell", help=", ".join(SHELLS))
    parser.set_defaults(run=partial(_print, whole))


def _print(whole: Callable[[], argparse.ArgumentParser], arguments: argparse.Namespace) -> int:
    print(script(whole(), check_choice("shell", arguments.shell, SHELLS)), end="")
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell; where nothing of it fits, shells complete files."""
    commands = list(_commands(parser, ()))
    if shell == "fish":
        return _fish(commands)
    return (_ZSH if shell == "zsh" else "") + _bash(commands)


def _commands(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[_Command]:
    options, within, parsers = (
        list[tuple[tuple[str, ...], str, bool]](),
        dict[str, str](),
        dict[str, argparse.ArgumentParser](),
    )
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers = dict(action.choices)
            within = {one.dest: one.help or "" for one in action._choices_actions}
        elif action.option_strings and action.help != argparse.SUPPRESS:
            options.append((tuple(action.option_strings), action.help or "", action.nargs != 0))
    yield _Command(path, options, within)
    for name, one in parsers.items():
        yield from _commands(one, (*path, name))


def _values() -> dict[str, tuple[str, ...]]:
    """The choices of options of ``generate`` that have some."""
    checks = {f"--{one.name.replace('_', '-')}": one.metadata["check"] for one in on_command_line(Options)}
    return {
        flag: check.keywords["choices"]
        for flag, check in checks.items()
        if isinstance(check, partial) and "choices" in check.keywords
    }


def _bash(commands: list[_Command]) -> str:
    from .version import __version__

    names = "|".join(f'" {" ".join(one.path)}"' for one in commands if one.path)
    values = [f'        {flag}) words="{" ".join(choices)}" ;;' for flag, choices in _values().items()]
    words = []
    for one in commands:
        known = [*one.commands, *(spelling for spellings, _, _ in one.options for spelling in spellings)]
        name = "".join(f" {part}" for part in one.path)
        words.append(f'                "{name}") words="{" ".join(known)}" ;;')
    return _BASH.format(version=__version__, commands=names, values="\n".join(values), words="\n".join(words))


def _fish(commands: list[_Command]) -> str:
    lines = ["# twinstream: for fish: twinstream completion fish > ~/.config/fish/completions/twinstream.fish"]
    values = _values()
    for one in commands:
        last = one.path[-1:]
        where = f"__fish_seen_subcommand_from {last[0]}" if last else "__fish_use_subcommand"
        inner = f"; and not __fish_seen_subcommand_from {' '.join(one.commands)}" if last and one.commands else ""
        for name, help in one.commands.items():
            lines.append(f"complete -c twinstream -f -n '{where}{inner}' -a {name} -d {_quoted(help)}")
        for spellings, help, has_value in one.options:
            flags = " ".join(f"-l {s[2:]}" if s.startswith("--") else f"-s {s[1:]}" for s in spellings)
            choices = next((values[s] for s in spellings if s in values), None)
            value = f" -x -a '{' '.join(choices)}'" if choices else " -r" if has_value else ""
            lines.append(f"complete -c twinstream -n '{where}' {flags}{value} -d {_quoted(help)}")
    return "\n".join(lines) + "\n"


def _quoted(help: str) -> str:
    """A help text's first clause, for fish."""
    first = re.split(r"[;:(.]", help.replace("%%", "%"))[0].strip()
    return "'" + first.replace("\\", "").replace("'", "\\'") + "'"
