"""Names of modules and calls: what lies above them, and how people may read them on a page or in a picture.

What has to tell names apart never asks for how they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

START = ":start"  # the call that runs before any block does, and what is copied for it


def above(name: str) -> Iterator[str]:
    """The modules in which a weight or a module lies, the innermost first, without the model itself.

    >>> list(above("blocks.3.up.weight"))
    ['blocks.3.up', 'blocks.3', 'blocks']
    """
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def printable(text: str) -> str:
    r"""A text with an escape for all that would not show: what terminals obey, what no file of text can hold.

    >>> print(printable("blocks.3\x1b[31m \ud800"))
    blocks.3\x1b[31m \ud800
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def spoken(text: str) -> str:
    """A text in which the one call that no module gives its name says where it runs.

    >>> spoken("h2d blocks.3"), spoken(":start")
    ('h2d blocks.3', 'before the first block')
    """
    return re.sub(rf"(?<!\S){START}\b", "before the first block", text)
