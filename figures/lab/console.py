"""What is printed: on any console, and beside a bar of progress."""

import codecs
import shutil
import sys
from io import TextIOWrapper
from typing import TextIO

PLAIN = {"±": "+-", "β": "beta", "…": "..."}


def spell_out(error: UnicodeEncodeError) -> tuple[str, int]:
    """Replace a character that a console can't show, as `PLAIN` says, or by its number."""
    character = error.object[error.start]
    return PLAIN.get(character, ascii(character)[1:-1]), error.start + 1


codecs.register_error("spell_out", spell_out)


def suit_any_console() -> None:
    """Let this process print on a console of any encoding; a notebook needs nothing."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="spell_out")


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once; on a terminal it takes the place of a bar that stands there.

    :param stream: None: standard output.
    """
    stream = stream or sys.stdout
    if stream.isatty():
        text = "\r" + text.ljust(shutil.get_terminal_size().columns - 1)
    print(text, file=stream, flush=True)
