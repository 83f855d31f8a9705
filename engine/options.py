"""Options declared once: default, help and check beside each field of a frozen dataclass.

Signatures and docstrings of the functions that take them (``takes``), the command line and the settings of a result
follow from the fields.
"""

from __future__ import annotations

import difflib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import Field, field, fields
from typing import Any, TypeVar

from .errors import UnknownArgumentError

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_DOC_WIDTH = 120


def option(
    default: Any,
    help: str,
    check: Callable[[str, Any], Any] | None = None,
    *,
    optional: bool = False,
    flags: tuple[str, ...] | None = None,
    metavar: str | None = None,
    setting: bool = False,
) -> Any:
    """A field of an options class.

    Args:
        default: its value where not given.
        help: what it means, as the docstring's ``Args`` and ``--help`` say it.
        check: ``check(name, value)`` returns the value as it is kept, or raises ``ValueError``.
        optional: whether None, for "not given", is left as it is.
        flags: further spellings on the command line, whose first is ``--name-with-dashes``; None where it is not there.
        metavar: what its value is called there.
        setting: whether ``Result.settings`` holds the value as it is.
    """
    facts = {"help": help, "check": check, "optional": optional, "flags": flags, "metavar": metavar, "setting": setting}
    return field(default=default, metadata=facts)


def check_options(options: Any) -> None:
    """Check every field; for ``__post_init__``."""
    for one in fields(options):
        check, value = one.metadata["check"], getattr(options, one.name)
        if check is not None and not (one.metadata["optional"] and value is None):
            object.__setattr__(options, one.name, check(one.name, value))


def make_options(kind: type[T], function: str, given: dict[str, Any]) -> T:
    """Options from keywords; one that there is not is refused, with the closest that there is."""
    known = [one.name for one in fields(kind)]  # pyright: ignore[reportArgumentType]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
            raise UnknownArgumentError(f"{function} has no keyword {name!r}{hint}")
    return kind(**given)


def takes(kind: type) -> Callable[[F], F]:
    """Give a function that hands its keywords to an options class their signature, and their help.

    The function ends in ``**options``; its docstring has a line ``{options}`` among its ``Args``.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
            for one in fields(kind)
        ]
        function.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        if function.__doc__:  # python -OO has none
            function.__doc__ = _fill(function.__doc__, [(one.name, one.metadata["help"]) for one in fields(kind)])
        return function

    return decorate


def on_command_line(kind: type) -> list[Field[Any]]:
    """The fields that the command line has."""
    return [one for one in fields(kind) if one.metadata["flags"] is not None]


def _fill(doc: str, entries: list[tuple[str, str]]) -> str:
    lines = []
    for line in doc.splitlines():
        if line.strip() != "{options}":
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        for name, help in entries:
            lines += textwrap.wrap(
                f"{name}: {help}", _DOC_WIDTH, initial_indent=indent, subsequent_indent=f"{indent}    ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(lines)
