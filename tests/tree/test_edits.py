"""Every way to write an add, on every version of Python that is at hand: the code with ops gives what it should, and so does its text."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ways
from ways import WAYS

from fxsd.tree.edits import Drop, change_text, change_tree, changes
from fxsd.tree.source import NoSource


def _pythons() -> dict[str, str]:
    """The interpreters at hand, by version."""
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = {running: sys.executable}
    for version in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        installed = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
        for python in filter(None, (*map(str, installed), shutil.which(f"python{version}"))):
            if version not in found and _version(python) == version:
                found[version] = python
    return found


def _version(python: str) -> str:
    asked = subprocess.run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True)
    return asked.stdout.strip()


PYTHONS = _pythons()


@cache
def _wrong(python: str) -> dict[str, dict[str, str]]:
    """What is wrong with each way, by name."""
    done = subprocess.run([python, ways.__file__], capture_output=True, text=True, cwd="/")
    assert not done.returncode, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("way", WAYS)
def test_code_with_ops_and_its_text_give_what_they_should(way: str, version: str):
    if version not in PYTHONS:
        pytest.skip(f"there is no Python {version} here")
    wrong = _wrong(PYTHONS[version])
    if way not in wrong:
        assert tuple(map(int, version.split("."))) < WAYS[way].since
        pytest.skip(f"Python {version} does not read it")
    assert not wrong[way], "\n".join(f"{picks}: {message}" for picks, message in wrong[way].items())


def test_every_way_writes_at_least_one_op():
    assert all(any(picks for picks in way.given) for way in WAYS.values())


# --- changes that no way shows: ops in functions that a function calls --------------------------------------------------------------


def _both(text: str, drops: Sequence[Drop], as_arguments: bool = False) -> str:
    """The text with ops in its only function, after a look whether the tree says the same."""

    def called(call: ast.Call, inside: Sequence[Drop]) -> str:
        assert all(not drop.owner and not drop.runs for drop in inside)
        return "_".join(["with", *(drop.op for drop in inside), *(str(number) for drop in inside for number in drop.path)])

    tree, other = ast.parse(text), ast.parse(text)
    definition, edited = tree.body[0], other.body[0]
    assert isinstance(definition, ast.FunctionDef)
    assert isinstance(edited, ast.FunctionDef)
    result = change_text(text, changes(definition, drops, called, as_arguments))
    change_tree(edited, changes(edited, drops, called, as_arguments))
    assert ast.dump(ast.parse(result)) == ast.dump(other)
    return result


def test_a_call_of_another_function_hands_on_the_op():
    text = "def forward(self, x):\n    return drop_add(  # adds\n        x, self.f(x))\n"
    expected = "def forward(self, x):\n    return self.with_op_1(self.op)(  # adds\n        x, self.f(x))\n"
    assert _both(text, [Drop((0, 1), 1, "op")]) == expected


def test_a_call_of_another_function_hands_on_several_ops_and_those_of_a_run():
    text = "def forward(self, x):\n    for _ in range(2):\n        x = a.b.drop_add(x, self.f(x))\n    return x\n"
    drops = [Drop((1, 1), 1, "op", runs=True), Drop((1, 2), 0, "op_1")]
    expected = (
        "def forward(self, x):\n    runs_of_op = []\n    for _ in range(2):\n"
        "        x = self.with_op_op_1_1_2(self.op.next(runs_of_op), self.op_1)(x, self.f(x))\n    return x\n"
    )
    assert _both(text, drops) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [("x, y", "op, x, y"), ("x, /, y", "op, x, /, y"), ("x=1, *y", "op, x=1, *y"), ("x: int, *, y: int = 2", "op, x: int, *, y: int = 2")],
)
def test_ops_are_the_first_arguments_of_a_function_that_is_called(given: str, expected: str):
    text = f"def drop_add({given}):\n    return x + y\n"
    assert _both(text, [Drop((0,), 1, "op", owner="")], as_arguments=True) == f"def drop_add({expected}):\n    return x + op(y)\n"


@pytest.mark.parametrize("given", ["", "*, x, y", "*xs", "**xs"])
def test_a_function_without_a_first_argument_takes_no_op(given: str):
    with pytest.raises(NoSource, match="no positional argument"):
        _both(f"def drop_add({given}):\n    return x + y\n", [Drop((0,), 1, "op", owner="")], as_arguments=True)


def test_an_op_has_a_name_of_its_own_among_the_arguments_of_a_function():
    text = "def drop_add(op, x):\n    return x + op(x)\n"
    definition: Any = ast.parse(text).body[0]
    found = changes(definition, [Drop((0,), 1, "op", owner="")], lambda call, inside: "", as_arguments=True)
    result = change_text(text, found)
    namespace: dict[str, Any] = {}
    exec(result, namespace)
    assert namespace["drop_add"](lambda branch: 10 * branch, lambda x: x + 1, 1) == 21
