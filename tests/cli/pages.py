"""Reads the pages that the command line prints."""

from __future__ import annotations

import re


def facts(text: str) -> dict[str, str]:
    """The labels of a page and what is said of each, wrapped lines joined."""
    found: dict[str, str] = {}
    label = ""
    for line in text.splitlines():
        if match := re.match(r"(\S+(?: \S+)*) {2,}(.*)", line):
            label = match[1]
            found[label] = match[2].strip()
        elif label and line.startswith(" " * 12):
            found[label] += " " + line.strip()
    return found
