"""Where in a function a frame stands: the expression that it is at. Knows nothing of torch."""

from __future__ import annotations

import ast
import dis
import sys
from itertools import islice
from types import CodeType, FunctionType

from fxsd.tree.once import once
from fxsd.tree.source import MARK, NoSource, source

_POSITIONS = sys.version_info >= (3, 11)  # a code tells columns


@once
def expression_at(function: FunctionType, code: CodeType, instruction: int) -> int:
    """The number of the expression, among `expressions` of the source of `function`, that a frame is at.

    Args:
        function: what was called, or what holds the function that was.
        code: of the frame: that of `function`, or of a function defined inside of it.
        instruction: `f_lasti` of the frame. Where the frame waits for a call it points behind the instruction, into its caches.

    Raises:
        NoSource: there is no source, or no sum or call stands there.
    """
    read = source(function)
    found = _by_columns(read.expressions(), code, instruction) if _POSITIONS else _by_lines(read.renumbered(), code, instruction)
    if found is None:
        raise NoSource("no sum or call is seen at the place of the add")
    return found


def line_of(code: CodeType, instruction: int) -> int:
    """The line of the file that a frame is at."""
    lines = [line for start, end, line in code.co_lines() if line is not None and start <= instruction < end]
    return lines[-1] if lines else code.co_firstlineno


def _by_columns(nodes: list[ast.AST], code: CodeType, instruction: int) -> int | None:
    line, end_line, column, end_column = next(islice(code.co_positions(), instruction // 2, None))  # type: ignore[attr-defined]
    start, end = (line, column), (end_line, end_column)
    around = None
    for number, node in enumerate(nodes):
        first = (node.lineno, node.col_offset)  # type: ignore[attr-defined]
        last = (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        if last != end:
            continue
        if first == start and isinstance(node, (ast.BinOp, ast.AugAssign, ast.Call)):
            return number
        # A call of an attribute on another line begins there.
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and first <= start:
            around = number
    return around


def _by_lines(renumbered: dict[int, CodeType], code: CodeType, instruction: int) -> int | None:
    numbered = renumbered.get(id(code))
    if numbered is None or numbered.co_code != code.co_code:
        return None
    line = line_of(numbered, instruction)
    is_operation = dis.opname[code.co_code[instruction]].startswith(("BINARY", "INPLACE", "CALL"))
    return line - MARK if line >= MARK and is_operation else None
