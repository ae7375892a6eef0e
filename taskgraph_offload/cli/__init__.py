"""The command line: plan, compare, sweep, run, show and models.

It sits on top of the whole package. It reads arguments, calls the library and prints; it decides nothing itself.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout

from rich.console import Console

from ..errors import OffloadError
from ..nouns.names import printable
from .answers import Answer, as_typed
from .arguments import parser
from .progress import show_progress

REFUSED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 1 after one line on stderr. Wrong usage exits with 2."""
    arguments = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # print "?" for a character that the terminal does not have
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings(), show_progress():  # stdout is for the answer alone
            warnings.simplefilter("ignore")  # warnings of other libraries are not about this command
            answer = arguments.answer(arguments)
        _print_answer(answer, arguments.command, arguments.json)
        sys.stdout.flush()
        if answer.fault is not None:
            raise answer.fault
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if arguments.traceback:
            raise
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return REFUSED
    return 0


def _print_answer(answer: Answer, command: str, as_json: bool) -> None:
    """On stdout, one JSON object or the page. Names in a page are printed as they are, never as markup."""
    if as_json:
        print(json.dumps({"command": command, **answer.document()}, indent=2, default=list, allow_nan=False))
    else:
        answer.show(Console(markup=False, highlight=False, emoji=False))


def in_one_line(error: Exception) -> str:
    """The first line of an error. If the error is not one of this library's, the name of its type comes first.

    >>> in_one_line(ValueError("first\\n  second"))
    'ValueError: first'
    """
    text = str(error).strip()
    first = text.splitlines()[0].rstrip(" :") if text else "no reason given"
    first = as_typed(first)
    if isinstance(error, OSError) and error.filename is not None:
        first = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, OffloadError):
        first = f"{type(error).__name__}: {first}"
    return printable(first)
