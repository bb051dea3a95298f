"""The constants at the top of a script: read, changed by the command line, and checked.

Nothing here takes long to import: `--help` and a misspelt option are answered at once.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, TypeVar

import pydantic
from pydantic import Field

from figures.lab.console import say, suit_any_console

T = TypeVar("T")
without_repetition = pydantic.AfterValidator(lambda values: tuple(dict.fromkeys(values)))
Distinct = Annotated[tuple[T, ...], Field(min_length=1), without_repetition]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Device = Literal["auto", "cpu", "mps", "cuda"] | Annotated[str, Field(pattern=r"^cuda:\d+$")]
Cores = Annotated[int, Field(ge=1, le=4096)]
Share = Annotated[float, Field(ge=0, le=1)]
Folder = Annotated[str, pydantic.AfterValidator(os.path.expanduser)]


class UserError(ValueError):
    """Report in one line, with exit code 2, what the user has to change."""


class Constants(pydantic.BaseModel):
    """Hold the constants of a script as attributes, by their names."""

    model_config = pydantic.ConfigDict(frozen=True, validate_default=True, allow_inf_nan=False)

    def changed(self, **changes) -> "Constants":
        """Return a copy with changes, which are checked like options.

        :raises UserError: if a name is unknown or a value not allowed.
        """
        return checked(type(self), dict(self) | changes)


def checked(kind: type[Constants], values: dict) -> Constants:
    """Make constants of values, or say which isn't allowed.

    :raises UserError: if a name is unknown or a value not allowed.
    """
    for name in values.keys() - kind.model_fields.keys():
        raise UserError(unknown(name, kind.model_fields))
    try:
        constants = kind(**values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name, value = first["loc"][0], repr(first["input"])
        raise UserError(f"{name} is {value[:80]}: {first['msg']}; see --help") from None
    for name, value in constants:
        if isinstance(value, int) and value > 10**9:
            raise UserError(f"{name} is {value}: no machine can do that")
    return constants


def unknown(word: str, names: Iterable[str], where: str = "--help") -> str:
    """Say that a word is none of the names, and which is nearest, or else where they stand."""
    plain = {as_option(name): name for name in names}
    near = get_close_matches(as_option(word), plain, n=1)
    return f"{word} is unknown; " + (f"did you mean {plain[near[0]]}?" if near else f"see {where}")


def as_option(name: str) -> str:
    """Write a name as an option: BATCH_SIZE is --batch-size."""
    return "--" + name.strip("-").lower().replace("_", "-")


def read_constants(script: ModuleType, arguments: Iterable[str] = ()) -> Constants:
    """Read the constants of a script, changed by options.

    :param script: module with lines `NAME: type = value  # comment`.
    :param arguments: options as on the command line, such as `["--seeds", "0", "1"]`.
    :raises UserError: if a name is unknown or a value not allowed.
    """
    fields = {name: (kind, getattr(script, name)) for name, kind in script.__annotations__.items()}
    source = Path(script.__file__).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^([A-Z_0-9]+): .+ = .+?  # (.+)$", source, re.MULTILINE))
    options = {as_option(name): name for name in fields}
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option value ...]",
        description=script.__doc__.split("\n")[0],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for option, name in options.items():
        text = f"{comments.get(name, '')} ({fields[name][1]})".replace("%", "%%")
        parser.add_argument(option, dest=name, nargs="*", metavar="", help=text)
    given, others = parser.parse_known_args(list(arguments))
    for word in others:
        raise UserError(unknown(word.split("=")[0], options))
    changes = vars(given)
    for name, words in changes.items():
        if not words and not isinstance(fields[name][1], str):
            words = ["true"]  # an option alone switches on
        if len(words) == 1 and not isinstance(fields[name][1], tuple):
            changes[name] = None if words[0].lower() == "none" else words[0]
    return checked(pydantic.create_model("ScriptConstants", __base__=Constants, **fields), changes)


def read_options(script: ModuleType) -> Constants:
    """Read the constants of a script that has been started, or end it in one line."""
    return run_command(lambda: read_constants(script, sys.argv[1:]))


def run_command(main: Callable[[], T]) -> T:
    """Call a function; end errors of the user and interruptions, from now on, in one line."""
    suit_any_console()
    signal.signal(signal.SIGINT, end_interrupted)
    signal.signal(signal.SIGTERM, end_interrupted)
    try:
        return main()
    except (UserError, OSError) as error:
        say(f"error: {error}", sys.stderr)
        sys.exit(2)


def end_interrupted(*_) -> None:
    """End the process and say how to go on."""
    text = "\ninterrupted; the same command goes on after the last finished experience"
    print(text, file=sys.stderr)
    sys.exit(130)
