"""The command line: plan, compare, sweep, run and show, for a model that may not even be on this machine.

Sits on top of all three packages and decides nothing itself: it reads arguments, calls the library, and prints.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout

from ..errors import OffloadError
from ..nouns.names import printable
from .arguments import parser
from .console import print_answer

REFUSED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code: 0 fine, 1 refused with one line on stderr; usage errors exit with 2."""
    arguments = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows no such character shows a question mark
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():  # a model's own words are not our answer,
            warnings.simplefilter("ignore")  # and other libraries warn of what is not for us to mend
            answer = arguments.answer(arguments)
        print_answer(answer, arguments.command, arguments.json)
        sys.stdout.flush()
        if answer.fault is not None:
            raise answer.fault
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read us has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if arguments.traceback:
            raise
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return REFUSED
    return 0


def in_one_line(error: Exception) -> str:
    """What an error says, with the name of its type where it is not one of this library's.

    >>> in_one_line(ValueError("first\\n  second"))
    'ValueError: first'
    """
    text = str(error).strip()
    first = text.splitlines()[0].rstrip(" :") if text else "no reason given"
    if isinstance(error, OSError) and error.filename is not None:
        first = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, OffloadError):
        first = f"{type(error).__name__}: {first}"
    return printable(first)
