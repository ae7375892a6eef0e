"""Names of modules and calls: the modules around them, and the form in which a page or a picture shows them.

The shown form is for people only: two names may have the same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

START = ":start"  # the call that runs before the first block, and the bundle that is copied for it


def above(name: str) -> Iterator[str]:
    """Give the modules around a weight or a module, the innermost first, without the model itself.

    >>> list(above("blocks.3.up.weight"))
    ['blocks.3.up', 'blocks.3', 'blocks']
    """
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def printable(text: str) -> str:
    r"""Replace by escapes what cannot be shown: orders to a terminal, characters that no text file can hold.

    >>> print(printable("blocks.3\x1b[31m \ud800"))
    blocks.3\x1b[31m \ud800
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def spoken(text: str) -> str:
    """Replace the name of the call that belongs to no module by words that say where it runs.

    >>> spoken("h2d blocks.3"), spoken(":start")
    ('h2d blocks.3', 'before the first block')
    """
    return re.sub(rf"(?<!\S){START}\b", "before the first block", text)
