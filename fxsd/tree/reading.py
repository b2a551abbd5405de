"""The code of a module as it runs, in its author's text with the ops written in: the change that one would have made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import unified_diff
from textwrap import dedent
from typing import Any

from torch import nn

from fxsd.tree.classes import ORIGINAL, Rewritten, Text, Writing, written_texts
from fxsd.tree.edits import Change, change_text


def functions(module: nn.Module) -> list[str]:
    """The functions of a module that have ops in them."""
    return list(dict.fromkeys(map(_function, _texts(module))))


def diffs(module: nn.Module) -> list[str]:
    """For each file with such functions, the change of it as a unified diff."""
    by_file: dict[str, tuple[str, list[Change]]] = {}
    for text in _texts(module):
        _, changed = by_file.setdefault(text.read.file, (text.read.text, []))
        changed += [change for change in text.changes if change not in changed]
    return [
        "".join(unified_diff(_lines(text), _lines(change_text(text, changed)), file, file)) for file, (text, changed) in by_file.items()
    ]


def _function(text: Text) -> str:
    before = text.read.text
    start, end = text.read.lines
    behind = len(_lines(before)) - end
    after = _lines(change_text(before, text.changes))
    return dedent("".join(after[start : len(after) - behind]))


def _lines(text: str) -> list[str]:
    """With their ends; of what Python takes for the end of one alone."""
    *lines, last = text.split("\n")
    return [f"{line}\n" for line in lines] + ([last] if last else [])


def _texts(module: nn.Module) -> Iterator[Text]:
    for value, writing in _written(module):
        yield from written_texts(value, writing)


def _written(module: nn.Module) -> Iterator[tuple[Any, Writing]]:
    if not isinstance(module, Rewritten):
        return
    for writing in module.writings:
        yield (vars(module)[ORIGINAL] if writing.holder is None else vars(writing.holder))[writing.name], writing
    for thing in vars(module).values():
        for writing in getattr(type(thing), "thing_writings", ()):
            yield vars(writing.holder)[writing.name], writing
