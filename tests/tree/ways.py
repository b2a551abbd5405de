"""Ways to write an add, and what each gives with ops in it. A script without torch: `python ways.py` checks all, and prints what failed.

A way is a file with a class `Block`, whose `forward` adds values that are texts: `x + self.f(x)` gives "(x+f(x))". Beside it stands, for
operands of its adds, what the same gives where ops are written there: {"0.1": "(x+op(f(x)))"} for operand 1 of the add that runs first.
"""

from __future__ import annotations

import ast
import json
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

REFUSED = "refused"


@dataclass(frozen=True)
class Way:
    """One way to write adds.

    Attributes:
        text: of the file.
        given: picks -> what comes out. A pick "1.0" is operand 0 of the add that runs second, "1.0*" the same with an op for each run of
            it, and "sum.2" the value of a `sum` that has two before it.
        since: version of Python that reads it.
    """

    text: str
    given: dict[str, str]
    since: tuple[int, int] = (3, 10)


def body(text: str, given: dict[str, str], since: tuple[int, int] = (3, 10)) -> Way:
    """A way that is the body of a forward."""
    return Way("class Block(Base):\n    def forward(self, x):\n" + indent(dedent(text).strip("\n"), " " * 8) + "\n", given, since)


def file(text: str, given: dict[str, str], since: tuple[int, int] = (3, 10)) -> Way:
    return Way(dedent(text).lstrip("\n"), given, since)


BOTH = {"": "(f(x)+x)", "0.0": "(op(f(x))+x)", "0.1": "(f(x)+op(x))"}
CHAIN = {
    "": "((f(x)+g(x))+x)",
    "0.0": "((op(f(x))+g(x))+x)",
    "0.1": "((f(x)+op(g(x)))+x)",
    "1.0": "(op((f(x)+g(x)))+x)",
    "1.1": "((f(x)+g(x))+op(x))",
    "0.0 0.1": "((op(f(x))+op_1(g(x)))+x)",
    "0.1 0.0": "((op_1(f(x))+op(g(x)))+x)",
}
LOOP = {
    "": "((x+f(x))+f((x+f(x))))",
    "0.1*": "((x+op.0(f(x)))+op.1(f((x+op.0(f(x))))))",
    "1.0*": "(op.1((op.0(x)+f(x)))+f((op.0(x)+f(x))))",
}

WAYS: dict[str, Way] = {
    # --- operators ----------------------------------------------------------------------------------------------------------
    "plus": body("return self.f(x) + x", BOTH),
    "plus, shortcut first": body("return x + self.f(x)", {"": "(x+f(x))", "0.0": "(op(x)+f(x))", "0.1": "(x+op(f(x)))"}),
    "plus, in a variable": body("h = self.f(x)\nh = h + x\nreturn h", BOTH),
    "plus, in parentheses": body("return ((self.f(x)) + (x))", BOTH),
    "plus, over lines": body(
        """
        return (
            self.f(  # the branch
                x
            )
            + x  # the shortcut
        )
        """,
        BOTH,
    ),
    "plus, over lines of one operand": body("return (self.f(\n    x,\n) + x)", BOTH),
    "plus, with a backslash": body("return self.f(x) \\\n    + x", BOTH),
    "plus, without blanks": body("return self.f(x)+x", BOTH),
    "two in one line": body(
        "return self.g(self.f(x) + x) + x",
        {
            "": "(g((f(x)+x))+x)",
            "0.0": "(g((op(f(x))+x))+x)",
            "1.0": "(op(g((f(x)+x)))+x)",
            "0.0 1.0": "(op_1(g((op(f(x))+x)))+x)",
            "1.0 0.0": "(op(g((op_1(f(x))+x)))+x)",
        },
    ),
    "chain": body("return self.f(x) + self.g(x) + x", CHAIN),
    "chain, over lines": body("return (self.f(x)\n        + self.g(x)\n        + x)", CHAIN),
    "chain, a branch in a branch on the left": body(
        "h = self.g(x)\nreturn self.f(h) + h + x",
        {
            "": "((f(g(x))+g(x))+x)",
            "0.0 1.0": "(op_1((op(f(g(x)))+g(x)))+x)",
            "1.0 0.0": "(op((op_1(f(g(x)))+g(x)))+x)",
        },
    ),
    "chain, a branch in a branch on the right": body(
        "h = self.g(x)\nreturn x + (h + self.f(h))",
        {"": "(x+(g(x)+f(g(x))))", "0.1 1.1": "(x+op_1((g(x)+op(f(g(x))))))", "1.1 0.1": "(x+op((g(x)+op_1(f(g(x))))))"},
    ),
    "chain, operands that end together": body(
        "h = self.g(x)\nreturn h + self.f(h) + x",
        {"": "((g(x)+f(g(x)))+x)", "0.1 1.0": "(op_1((g(x)+op(f(g(x)))))+x)", "1.0 0.1": "(op((g(x)+op_1(f(g(x)))))+x)"},
    ),
    "chain in a loop, operands that end together": body(
        "for _ in range(2):\n    h = self.g(x)\n    x = h + self.f(h) + x\nreturn x",
        {"0.1* 1.0*": "(op_1.1((g(X)+op.1(f(g(X)))))+X)".replace("X", "(op_1.0((g(x)+op.0(f(g(x)))))+x)")},
    ),
    "augmented": body("x += self.f(x)\nreturn x", {"": "(x+f(x))", "0.1": "(x+op(f(x)))"}),
    "augmented, a conditional value": body("x += self.f(x) if x else x\nreturn x", {"": "(x+f(x))", "0.1": "(x+op(f(x)))"}),
    "augmented, branch on the left": body("out = self.f(x)\nout += x\nreturn out", BOTH),
    "augmented, branch on the left, an argument": body(
        """
        def inner(out, identity):
            out += identity
            return out

        return inner(self.f(x), x)
        """,
        BOTH,
    ),
    "augmented, branch on the left, aliased before": body("out = r = self.f(x)\nout += x\nreturn r", BOTH),
    "augmented, branch on the left, aliased by another": body("r = self.f(x)\nout = r\nout += x\nreturn r", BOTH),
    "augmented, branch on the left, aliased by several": body("r, s = self.f(x), self.g(x)\nout, t = r, s\nout += x\nreturn r", BOTH),
    "augmented, branch on the left, aliased by a walrus": body("(out := (r := self.f(x)))\nout += x\nreturn r", BOTH),
    "augmented, branch on the left, aliased in a list": body("out = self.f(x)\nkept = [out]\nout += x\nreturn kept[0]", BOTH),
    "augmented, branch on the left, aliased by a loop": body("kept = [self.f(x)]\nfor out in kept:\n    out += x\nreturn kept[0]", BOTH),
    "augmented, branch on the left, aliased by an attribute": body("out = self.h = self.f(x)\nout += x\nreturn self.h", BOTH),
    "augmented, an attribute that is aliased": body("out = self.f(x)\nself.h = out\nself.h += x\nreturn out", BOTH),
    "augmented, an attribute": body("self.h = self.f(x)\nself.h += x\nreturn self.h", BOTH),
    "augmented, an attribute of an attribute": body("self.a = self\nself.a.h = self.f(x)\nself.a.h += x\nreturn self.h", BOTH),
    "augmented, a subscript": body("h = [self.f(x)]\nh[0] += x\nreturn h[0]", {"": "(f(x)+x)", "0.1": "(f(x)+op(x))", "0.0": REFUSED}),
    "augmented, in the body of an if, on its line": body("out = self.f(x)\nif x: out += x\nreturn out", BOTH),
    "augmented, in the body of an else, on its line": body("out = self.f(x)\nif not x: pass\nelse: out += x\nreturn out", BOTH),
    "augmented, in the body of a for, on its line": body("out = self.f(x)\nfor _ in range(1): out += x\nreturn out", BOTH),
    "augmented, after a semicolon": body("out = self.f(x); out += x; return out", BOTH),
    "augmented, in the body of an if, after a semicolon": body("out = self.f(x)\nif x: pass; out += x\nreturn out", BOTH),
    "augmented, with a backslash": body("out = self.f(x)\nout \\\n    += x\nreturn out", BOTH),
    "augmented, behind a backslash": body("out = self.f(x); \\\n    out += x\nreturn out", BOTH),
    "augmented, in the body of an if, behind a backslash": body("out = self.f(x)\nif x: pass; \\\n    out += x\nreturn out", BOTH),
    "augmented, in try, with and match": body(
        """
        out = self.f(x)
        try:
            with self.around():
                match x:
                    case _:
                        out += x
        finally:
            pass
        return out
        """,
        BOTH,
    ),
    "augmented, nonlocal": body(
        """
        out = self.f(x)

        def inner():
            nonlocal out
            out += x

        inner()
        return out
        """,
        BOTH,
    ),
    "augmented, in a body that is a line": file(
        """
        class Block(Base):
            def forward(self, x): out = self.f(x); out += x; return out
        """,
        BOTH,
    ),
    # --- methods ------------------------------------------------------------------------------------------------------------
    "method": body("return self.f(x).add(x)", BOTH),
    "method of a variable": body("h = self.f(x)\nreturn h.add(x)", BOTH),
    "method, by keyword": body("return self.f(x).add(other=x)", BOTH),
    "method, over lines": body("return (\n    self.f(x)\n    .same()\n    .add(x)\n    .same()\n)", BOTH),
    "method, over lines of its arguments": body("return self.f(x).add(\n    x,\n).same()", BOTH),
    "method, special": body("return self.f(x).__add__(x)", BOTH),
    "methods, a chain": body("return self.f(x).add(self.g(x)).add(x)", CHAIN),
    "methods, a chain over lines": body("return (\n    self.f(x)\n    .add(self.g(x))\n    .add(x)\n)", CHAIN),
    "in place": body("h = self.f(x)\nreturn h.add_(x)", BOTH),
    "in place, a statement": body("h = self.f(x)\nh.add_(x)\nreturn h", BOTH),
    "in place, of a call": body("return self.f(x).add_(x)", BOTH),
    "in place, of a chain over lines": body("return (\n    self.f(x)\n    .same()\n    .add_(x)\n)", BOTH),
    "in place, into the shortcut": body("x.add_(self.f(x))\nreturn x", {"": "(x+f(x))", "0.1": "(x+op(f(x)))"}),
    "in place, aliased": body("r = self.f(x)\ny = r\ny.add_(x)\nreturn r", BOTH),
    "in place, aliased, special": body("r = self.f(x)\ny = r\ny.__iadd__(x)\nreturn r", BOTH),
    "in place, aliased in a list": body("r = self.f(x)\nkept = [r]\nr.add_(x)\nreturn kept[0]", BOTH),
    "in place, of an attribute": body("self.h = self.f(x)\nself.h.add_(x)\nreturn self.h", BOTH),
    "in place, in a closure": body("h = self.f(x)\n\ndef inner():\n    return h.add_(x)\n\nreturn inner()", BOTH),
    "in place, in a closure that is read": body("h = self.f(x)\n\ndef inner():\n    h.add_(x)\n\ninner()\nreturn h", BOTH),
    "in place, in a lambda": body("h = self.f(x)\nreturn (lambda: h.add_(x))()", BOTH),
    "in place, in a comprehension": body("return [h.add_(x) for h in [self.f(x)]][0]", BOTH),
    # --- functions ----------------------------------------------------------------------------------------------------------
    "operator.add": file(
        """
        import operator


        class Block(Base):
            def forward(self, x):
                return operator.add(self.f(x), x)
        """,
        BOTH,
    ),
    "add, imported": file(
        """
        from operator import add


        class Block(Base):
            def forward(self, x):
                return add(self.f(x), x)
        """,
        BOTH,
    ),
    "operator.add, imported by another name": file(
        """
        if True:
            try:
                import operator as o
            except ImportError:
                o = None


        class Block(Base):
            def forward(self, x):
                return o.add(self.f(x), x)
        """,
        BOTH,
    ),
    "operator.add, imported where it is called": body("import operator\n\nreturn operator.add(self.f(x), x)", BOTH),
    "operator.add, imported in the class": file(
        """
        class Block(Base):
            import operator as o

            def forward(self, x):
                return self.o.add(self.f(x), x)
        """,
        BOTH,
    ),
    "operator.add, after a star": file(
        """
        from operator import *
        import os.path


        class Block(Base):
            def forward(self, x):
                os.path.join("a", "b")
                return add(self.f(x), x)
        """,
        BOTH,
    ),
    "operator.add, through a global": file(
        """
        import operator

        plus = operator.add


        class Block(Base):
            def forward(self, x):
                return plus(self.f(x), x)
        """,
        BOTH,
    ),
    "operator.add, through a local": file(
        """
        import operator


        class Block(Base):
            def forward(self, x):
                plus = operator.add
                return plus(self.f(x), x)
        """,
        BOTH,
    ),
    "operator.add, over lines": file(
        """
        import operator


        class Block(Base):
            def forward(self, x):
                return operator.add(
                    self.f(x),  # the branch
                    x,
                )
        """,
        BOTH,
    ),
    "operator.add, of a walrus": file(
        """
        import operator


        class Block(Base):
            def forward(self, x):
                return operator.add(h := self.f(x), x)
        """,
        BOTH,
    ),
    "operator.add, of stars": file(
        """
        import operator


        class Block(Base):
            def forward(self, x):
                return operator.add(*(self.f(x), x))
        """,
        {"": "(f(x)+x)", "0.0": REFUSED, "0.1": REFUSED},
    ),
    "operator.iadd": file(
        """
        import operator


        class Block(Base):
            def forward(self, x):
                return operator.iadd(self.f(x), x)
        """,
        BOTH,
    ),
    "operator.iadd, a statement": file(
        """
        import operator


        class Block(Base):
            def forward(self, x):
                h = self.f(x)
                operator.iadd(h, x)
                return h
        """,
        BOTH,
    ),
    "operator.iadd, imported, a statement": file(
        """
        from operator import iadd


        class Block(Base):
            def forward(self, x):
                h = self.f(x)
                iadd(h, x)
                return h
        """,
        BOTH,
    ),
    "a function, by keywords": body("return adds.add(input=self.f(x), other=x)", BOTH),
    "a function, by keywords in another order": body("return adds.add(other=x, input=self.f(x))", BOTH),
    "a function, by one keyword": body("return adds.add(self.f(x), other=x)", BOTH),
    "a function, with more keywords": body("return adds.add(self.f(x), x, alpha=1)", BOTH),
    "a function of the module": body("return self.plus(self.f(x), x)", BOTH),
    # --- sums of several ----------------------------------------------------------------------------------------------------
    "sum of a list": body(
        "return sum([self.f(x), self.g(x), x])",
        {
            "": "(((0+f(x))+g(x))+x)",
            "sum.0": "(((0+op(f(x)))+g(x))+x)",
            "sum.1": "(((0+f(x))+op(g(x)))+x)",
            "sum.2": "(((0+f(x))+g(x))+op(x))",
            "sum.0 sum.1": "(((0+op(f(x)))+op_1(g(x)))+x)",
            "sum.1 sum.0": "(((0+op_1(f(x)))+op(g(x)))+x)",
        },
    ),
    "sum of a tuple": body("return sum((self.f(x), x))", {"sum.0": "((0+op(f(x)))+x)", "sum.1": "((0+f(x))+op(x))"}),
    "sum of a variable": body("values = [self.f(x), x]\nreturn sum(values)", {"sum.0": "((0+op(f(x)))+x)", "sum.1": "((0+f(x))+op(x))"}),
    "sum with a start": body("return sum([self.f(x)], x)", {"": "(x+f(x))", "sum.0": "(x+op(f(x)))"}),
    "sum of a generator": body(
        "return sum(h(x) for h in (self.f, self.g))", {"sum.0": "((0+op(f(x)))+g(x))", "sum.1": "((0+f(x))+op(g(x)))"}
    ),
    "sum of a generator in parentheses": body(
        "return sum((h(x) for h in (self.f, self.g)))", {"sum.0": "((0+op(f(x)))+g(x))", "sum.1": "((0+f(x))+op(g(x)))"}
    ),
    "sum of a generator, with a start": body(
        "return sum((h(x) for h in (self.f, self.g)), x)", {"sum.0": "((x+op(f(x)))+g(x))", "sum.1": "((x+f(x))+op(g(x)))"}
    ),
    "sum of a list comprehension": body(
        "return sum([h(x) for h in (self.f, self.g)])", {"sum.0": "((0+op(f(x)))+g(x))", "sum.1": "((0+f(x))+op(g(x)))"}
    ),
    "sum of stars": body("return sum(*[[self.f(x), x]])", {"": "((0+f(x))+x)", "sum.0": REFUSED}),
    "sum, over lines": body("return sum(\n    (\n        self.f(x),\n        x,\n    )\n)", {"sum.0": "((0+op(f(x)))+x)"}),
    # --- where an add stands ------------------------------------------------------------------------------------------------
    "in a list comprehension": body("return [self.f(y) + y for y in [x]][0]", BOTH),
    "in a generator expression": body("return next(self.f(y) + y for y in [x])", BOTH),
    "in a set and a dict comprehension": body("return [*{k: v for k, v in {1: self.f(x) + x}.items()}.values()][0]", BOTH),
    "in a comprehension in a comprehension": body("return [[self.f(y) + y for y in z] for z in [[x]]][0][0]", BOTH),
    "in the condition of a comprehension": body("return [z for y in [x] if (z := self.f(y) + y)][0]", BOTH),
    "in a comprehension, several runs": body(
        "return [self.f(y) + x for y in (x, self.g(x))][1]", {"": "(f(g(x))+x)", "0.0*": "(op.1(f(g(x)))+x)", "0.1*": "(f(g(x))+op.1(x))"}
    ),
    "in a nested function": body("def inner(y):\n    return self.f(y) + y\n\nreturn inner(x)", BOTH),
    "in a nested function of a nested function": body(
        "def inner(y):\n    def innermost():\n        return self.f(y) + y\n\n    return innermost()\n\nreturn inner(x)", BOTH
    ),
    "in the second of two nested functions": body(
        "def first(y):\n    return self.f(y) + self.f(y)\n\ndef second(y):\n    return self.f(y) + y\n\nreturn second(x)", BOTH
    ),
    "in a lambda": body("return (lambda y: self.f(y) + y)(x)", BOTH),
    "in one of two lambdas": body("return (lambda y: x + self.f(y), lambda y: self.f(y) + x)[1](x)", BOTH),
    "in the default of a nested function": body("def inner(y=self.f(x) + x):\n    return y\n\nreturn inner()", BOTH),
    "in the default of a lambda": body("return (lambda y=self.f(x) + x: y)()", BOTH),
    "in the decorator of a nested function": body("@self.into(self.f(x) + x)\ndef inner():\n    pass\n\nreturn inner", BOTH),
    "in an f-string": body("return f'{self.f(x) + x}'", BOTH),
    "in an f-string, with text around": body("return f'é {1:>{2}} {self.f(x) + x!s:}'[5:]", BOTH),
    "in an f-string, over lines": body("return (\n    f''\n    f'{self.f(x) + x}'\n)", BOTH),
    "in an f-string of three quotes": body('return f"""\n{self.f(x) + x}\n""".strip()', BOTH),
    "in a conditional expression": body("return self.f(x) + x if x else x", BOTH),
    "in the test of a conditional expression": body("return h if (h := self.f(x) + x) else x", BOTH),
    "a conditional operand": body("return (self.f(x) if x else x) + x", BOTH),
    "in a walrus": body("if (h := self.f(x) + x):\n    return h\nreturn x", BOTH),
    "a walrus as operand": body("return (h := self.f(x)) + x", BOTH),
    "in a subscript and an attribute": body("h = {'y': self}\nreturn h['y'].f(x) + [x][0]", BOTH),
    "in a return of several": body("return (x, self.f(x) + x)[1]", BOTH),
    "in an argument": body("return self.same(self.f(x) + x)", BOTH),
    "in a keyword argument": body("return self.same(value=self.f(x) + x)", BOTH),
    "in stars": body("return self.same(*[self.f(x) + x], **{})", BOTH),
    "in an annotated assignment": body("h: object = self.f(x) + x\nreturn h", BOTH),
    "in a while": body("while (h := self.f(x) + x):\n    return h", BOTH),
    "in an assert": body("assert self.f(x)\nh = self.f(x) + x\nassert h, 'text'\nreturn h", BOTH),
    "beside other sums and calls": body(
        "n = 1 + len('a' + 'b')\nn += 2\ny = [1, *range(n)]\nh = self.f(x) + x\nreturn self.same(h, 1 + n)", BOTH
    ),
    "behind text that is no ASCII": body("é = 'ééé€'; h = self.f(x) + x; return h", BOTH),
    "of variables that are no ASCII": body("größe = self.f(x); größe += x; return größe", BOTH),
    "between text that is no ASCII": body("return {'é': self.f(x) + x, '😀': 'ü'}['é']", BOTH),
    "behind tabs": Way("class Block(Base):\n\tdef forward(self, x):\n\t\th\t=\tself.f(x)\n\t\th\t+=\tx\n\t\treturn\th\n", BOTH),
    "behind tabs, plus": Way("class Block(Base):\n\tdef forward(self, x):\n\t\treturn\tself.f(x)\t+\tx\n", BOTH),
    "in a file with a form feed": Way(
        "\f\nclass Block(Base):\n    s = '\f'\n\n\f\n    def forward(self, x):\n        return self.f(x) + x\n", BOTH
    ),
    "behind a form feed on the line": Way(
        "class Block(Base):\n    def forward(self, x):\n        s = '\f\u2028\x1c'; return self.f(x) + x\n", BOTH
    ),
    "in a file with a byte order mark": Way("\ufeffclass Block(Base):\n    def forward(self, x):\n        return self.f(x) + x\n", BOTH),
    "in a file with no line end": Way("class Block(Base):\n    def forward(self, x):\n        return self.f(x) + x", BOTH),
    "in a file with line ends of Windows": Way(
        "class Block(Base):\r\n    def forward(self, x):\r\n        out = self.f(x)\r\n        out += x\r\n        return out\r\n", BOTH
    ),
    # --- loops --------------------------------------------------------------------------------------------------------------
    "loop": body("for _ in range(2):\n    x = x + self.f(x)\nreturn x", LOOP),
    "loop, with a docstring": body('"""Doc."""\nfor _ in range(2):\n    x = x + self.f(x)\nreturn x', LOOP),
    "loop, with a docstring and a comment": body('"""Doc."""\n\n# text\nfor _ in range(2):\n    x = x + self.f(x)\nreturn x', LOOP),
    "loop, while": body("n = 0\nwhile n < 2:\n    x = x + self.f(x)\n    n += 1\nreturn x", LOOP),
    "loop, on its line": body("for _ in range(2): x = x + self.f(x)\nreturn x", LOOP),
    "loop, in a body that starts with its docstring": file(
        """
        class Block(Base):
            def forward(self, x): "Doc."; y = [x := x + self.f(x) for _ in range(2)]; return x
        """,
        LOOP,
    ),
    "loop, in a nested function": body(
        "def inner(y):\n    for _ in range(2):\n        y = y + self.f(y)\n    return y\n\nreturn inner(x)", LOOP
    ),
    "loop, over a nested function": body("def inner(y):\n    return y + self.f(y)\n\nreturn inner(inner(x))", LOOP),
    "loop, first a decorated function": body("@self.as_is\ndef inner(y):\n    return y + self.f(y)\n\nreturn inner(inner(x))", LOOP),
    "loop, first a decorated class": body(
        "@self.as_is\nclass Inner:\n    pass\n\nfor _ in range(2):\n    x = x + self.f(x)\nreturn x", LOOP
    ),
    "loop, first a global": body("global n_o\nn_o = 1\nfor _ in range(2):\n    x = x + self.f(x)\nreturn x", LOOP),
    "loop, augmented": body(
        "h = self.f(x)\nfor _ in range(2):\n    h += x\nreturn h", {"": "((f(x)+x)+x)", "0.0*": "(op.1((op.0(f(x))+x))+x)"}
    ),
    "loop, augmented on its line": body(
        "h = self.f(x)\nfor _ in range(2): h += x\nreturn h", {"": "((f(x)+x)+x)", "0.0*": "(op.1((op.0(f(x))+x))+x)"}
    ),
    "loop, a lambda": file(
        """
        class Block(Base):
            forward = lambda self, x: [x := x + self.f(x) for _ in range(2)][1]
        """,
        {"": LOOP[""], "0.1*": REFUSED},
    ),
    "loop, a name that is taken": body("runs_of = 3\nfor _ in range(2):\n    x = x + self.f(x)\nreturn self.same(x, runs_of)", LOOP),
    "loop, a name of an attribute that is taken": body(
        "runs_of_op = 2\nfor _ in range(runs_of_op):\n    x = x + self.f(x)\nreturn self.same(x, runs_of_op)", LOOP
    ),
    # --- functions ----------------------------------------------------------------------------------------------------------
    "a docstring": body('"""Adds.\n\nWell.\n"""\nreturn self.f(x) + x', BOTH),
    "annotations": file(
        """
        class Block(Base):
            def forward(self, x: list[int]) -> dict[str, int]:
                return self.f(x) + x
        """,
        BOTH,
    ),
    "annotations, not evaluated": file(
        """
        from __future__ import annotations


        class Block(Base):
            def forward(self, x: Never) -> Never:
                return self.f(x) + x
        """,
        BOTH,
    ),
    "defaults": file(
        """
        class Block(Base):
            def forward(self, x, /, y=1 + 2, *more, z=len('a'), **named):
                return self.same(self.f(x) + x, y + z)
        """,
        BOTH,
    ),
    "a lambda": file("class Block(Base):\n    forward = lambda self, x: self.f(x) + x\n", BOTH),
    "a lambda, over lines": file(
        """
        class Block(Base):
            forward = (
                lambda self, x: self.f(x)
                + x
            )
        """,
        BOTH,
    ),
    "a lambda beside another": file(
        "class Block(Base):\n    other, forward = lambda self, x: x + x, lambda self, x: self.f(x) + x\n", BOTH
    ),
    "a lambda beside one like it": file(
        "class Block(Base):\n    other, forward = lambda self, x: self.f(x) + x, lambda self, x: self.f(x) + x\n", BOTH, since=(3, 11)
    ),
    "a lambda with a default that is a lambda": file(
        "class Block(Base):\n    forward = lambda self, x, h=lambda y: y: h(self.f(x) + x)\n", BOTH
    ),
    "a function of the file": file(
        """
        def forward(self, x):
            return self.f(x) + x


        class Block(Base):
            forward = forward
        """,
        BOTH,
    ),
    "a class in a function": file(
        """
        def make(n):
            def same(value):
                return value

            class Block(Base):
                def forward(self, x):
                    return same(self.f(x)) + x if n else x

            return Block


        Block = make(1)
        """,
        BOTH,
    ),
    "a class in a class": file(
        """
        class Outer:
            class Block(Base):
                def forward(self, x):
                    return self.f(x) + x


        Block = Outer.Block
        """,
        BOTH,
    ),
    "a class in a condition": file(
        """
        if True:
            class Block(Base):
                def forward(self, x):
                    return self.f(x) + x
        """,
        BOTH,
    ),
    "a method in a condition": file(
        """
        class Block(Base):
            if True:
                def forward(self, x):
                    return self.f(x) + x
            else:
                def forward(self, x):
                    return x + self.f(x)
        """,
        BOTH,
    ),
    "super": file(
        """
        class Middle(Base):
            def forward(self, x):
                return self.f(x)


        class Block(Middle):
            def forward(self, x):
                return super().forward(x) + x
        """,
        BOTH,
    ),
    "super, with arguments": file(
        """
        class Middle(Base):
            def forward(self, x):
                return self.f(x)


        class Block(Middle):
            def forward(self, x):
                return super(Block, self).forward(x) + x
        """,
        BOTH,
    ),
    "super, in a lambda": file(
        """
        class Middle(Base):
            def forward(self, x):
                return self.f(x)


        class Block(Middle):
            def forward(self, x):
                return (lambda: super(__class__, self).forward(x) + x)()
        """,
        BOTH,
    ),
    "__class__": body("return self.same(self.f(x) + x, __class__)", BOTH),
    "private names": file(
        """
        class Block(Base):
            def __branch(self, x):
                return self.f(x)

            def forward(self, x):
                __x = x
                self.__h = self.__branch(x)
                self.__h += __x
                return self.__h
        """,
        BOTH,
    ),
    "private names, plus": file(
        """
        class Block(Base):
            def __branch(self, x):
                return self.f(x)

            def forward(self, x):
                return self.__branch(x) + x
        """,
        BOTH,
    ),
    "decorated": file(
        """
        import functools


        def around(function):
            @functools.wraps(function)
            def wrapper(self, *args, **kwargs):
                return function(self, *args, **kwargs)

            return wrapper


        class Block(Base):
            @around
            @functools.partial(around)
            @around
            def forward(self, x):
                return self.f(x) + x
        """,
        BOTH,
    ),
    "decorated, without wraps": file(
        """
        def named(name, key=lambda a: a + a):
            def around(function):
                return lambda self, *args: function(self, *args)
            return around


        class Block(Base):
            @named("a" + "b", key=lambda a: a + "c")
            def forward(self, x):
                return self.f(x) + x
        """,
        BOTH,
    ),
    "decorated, the add in what is around": file(
        """
        import functools


        def residual(function):
            @functools.wraps(function)
            def wrapper(self, x):
                return function(self, x) + x

            return wrapper


        class Block(Base):
            @residual
            def forward(self, x):
                return self.f(x)
        """,
        BOTH,
    ),
    "decorated, a lambda around": file(
        """
        def residual(function):
            return lambda self, x: function(self, x) + x


        class Block(Base):
            @residual
            def forward(self, x):
                return self.f(x)
        """,
        BOTH,
    ),
    "a closure": file(
        """
        def make(scale, unused):
            def forward(self, x):
                return scale(self.f(x)) + x

            return forward


        class Block(Base):
            forward = make(lambda h: h, 2)
        """,
        BOTH,
    ),
    "a closure over itself": file(
        """
        def make():
            depth = 0

            def forward(self, x):
                nonlocal depth
                depth += 1
                return self.same(self.f(x) + x, forward)

            return forward


        class Block(Base):
            forward = make()
        """,
        BOTH,
    ),
    "partial": file(
        """
        import functools


        class Block(Base):
            def add(self, n, x):
                return self.f(x) + x

            forward = functools.partialmethod(add, 1)
        """,
        BOTH,
    ),
    "a property": file(
        """
        class Block(Base):
            def forward(self, x):
                self.x = x
                return self.sum

            @property
            def sum(self):
                return self.f(self.x) + self.x
        """,
        BOTH,
    ),
    "async": file(
        """
        class Block(Base):
            async def forward(self, x):
                return self.f(x) + x
        """,
        BOTH,
    ),
    "async, awaited operands": file(
        """
        class Block(Base):
            async def later(self, x):
                return self.f(x)

            async def forward(self, x):
                return await self.later(x) + x
        """,
        BOTH,
    ),
    "async, a comprehension": file(
        """
        class Block(Base):
            async def some(self, x):
                yield x

            async def forward(self, x):
                return [self.f(y) + y async for y in self.some(x)][0]
        """,
        BOTH,
    ),
    "a generator": file(
        """
        class Block(Base):
            def forward(self, x):
                yield self.f(x) + x
        """,
        BOTH,
    ),
    "a generator, a sent operand": file(
        """
        class Block(Base):
            def forward(self, x):
                return (yield self.f(x)) + x
        """,
        {"": "(None+x)", "0.0": "(op(None)+x)"},
    ),
    "type parameters of a function": file(
        """
        class Block(Base):
            def forward[T](self, x: T) -> T:
                return self.f(x) + x
        """,
        BOTH,
        (3, 12),
    ),
    "type parameters of a class": file(
        """
        class Block[T](Base):
            def forward(self, x: T) -> T:
                return self.f(x) + x
        """,
        BOTH,
        (3, 12),
    ),
    "two functions of one name": file(
        """
        class Block(Base):
            def forward(self, x):
                return x + self.f(x)

            def forward(self, x):  # noqa: F811
                return self.f(x) + x
        """,
        BOTH,
    ),
    "a body that ends early": body("if x:\n    return self.f(x) + x\nreturn x\nreturn self.g(x) + x", BOTH),
    "code that is never run": body("if 0:\n    y = self.g(x) + x\nif False:\n    x += x\nreturn self.f(x) + x", BOTH),
    "constants that are folded": body("n = 1 + 2\nm = 'a' + 'b'\nk = (1, 2) + (3,)\nreturn self.same(self.f(x) + x, n, m, k)", BOTH),
    "many instructions": body(
        "\n".join(f"v{n} = [self, {n}, 1.5, -0.0, 'text {n}', {n}j, ..., None, b'b']" for n in range(300))
        + "\nfor _ in range(1):\n    h = self.f(x) + x\nreturn h",
        BOTH,
    ),
}


# --- values ---------------------------------------------------------------------------------------------------------------------

NOTES: list[tuple[Any, int]] = []


def note() -> None:
    """Where the caller of the caller stands."""
    frame = sys._getframe(2)
    NOTES.append((frame.f_code, frame.f_lasti))


class Value:
    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: object) -> Value:
        note()
        return Value(f"({self}+{other})")

    def __radd__(self, other: object) -> Value:
        note()
        return Value(f"({other}+{self})")

    def __iadd__(self, other: object) -> Value:
        note()
        self.text = f"({self}+{other})"
        return self

    def add(self, other: object) -> Value:
        note()
        return Value(f"({self}+{other})")

    def add_(self, other: object) -> Value:
        note()
        self.text = f"({self}+{other})"
        return self

    def copy_(self, other: object) -> Value:
        self.text = str(other)
        return self

    def same(self) -> Value:
        return self


class Op:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, value: object, runs: list[None] | None = None) -> Value:
        if runs is None:
            return Value(f"{self.name}({value})")
        runs.append(None)
        return Value(f"{self.name}.{len(runs) - 1}({value})")

    def among(self, values: Any, before: int) -> list[Any]:
        return [self(value) if place == before else value for place, value in enumerate(values)]


def add(input: object, other: object, alpha: int = 1) -> Value:
    note()
    return Value(f"({input}+{other})")


class Around:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class Base:
    def f(self, x: object) -> Value:
        return Value(f"f({x})")

    def g(self, x: object) -> Value:
        return Value(f"g({x})")

    def plus(self, a: object, b: object) -> Value:
        note()
        return Value(f"({a}+{b})")

    def same(self, value: object, *others: object) -> object:
        return value

    def around(self) -> Around:
        return Around()

    def as_is(self, value: object) -> object:
        return value

    def into(self, value: object) -> Callable[[object], object]:
        return lambda function: value


# --- the check ------------------------------------------------------------------------------------------------------------------


def run(cls: Any, names: list[str]) -> str:
    """What the forward of a block gives that has ops of these names."""
    block = cls()
    for name in names:
        setattr(block, name, Op(name))
    NOTES.clear()
    result = block.forward(Value("x"))
    if isinstance(result, (types.CoroutineType, types.GeneratorType)):
        result = exhausted(result)
    return str(result)


def exhausted(started: Any) -> Any:
    """What is returned in the end, or else what is yielded last."""
    last = None
    while True:
        try:
            last = started.send(None)
        except StopIteration as stop:
            return last if stop.value is None else stop.value


def load(text: str, folder: str, name: str) -> Any:
    """The class `Block` of a file."""
    path = Path(folder) / f"{name}.py"
    path.write_bytes(text.encode())
    namespace: dict[str, Any] = {"__name__": name, "Base": Base, "adds": types.SimpleNamespace(add=add)}
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), namespace)
    return namespace["Block"]


def check(way: Way, folder: str, name: str) -> dict[str, str]:
    """What is wrong, by picks: where the code with ops gives another value, or the text with ops is another code or gives another value."""
    cls = load(way.text, folder, name)
    wrong: dict[str, str] = {}
    original = run(cls, [])
    if original != way.given.get("", original):
        wrong[""] = f"the way itself gives {original}"
    notes = list(NOTES)
    for number, (picks, expected) in enumerate(way.given.items()):
        if not picks:
            continue
        try:
            found = given_with_ops(cls, notes, picks, folder, f"{name}_{number}")
        except Exception as error:
            is_refused = type(error).__name__ == "NoSource"
            found = [REFUSED if is_refused else traceback.format_exc()]
            if is_refused and expected != REFUSED:
                found = [f"{REFUSED}: {error}"]
        if any(each != expected for each in found):
            wrong[picks] = f"expected {expected}, got " + ", and of the text ".join(found)
    return wrong


def given_with_ops(cls: Any, notes: list[tuple[Any, int]], picks: str, folder: str, name: str) -> list[str]:
    """What the code with ops gives, and what its text."""
    from fxsd.tree.edits import Drop, change_text, change_tree, changes
    from fxsd.tree.functions import find, functions_in, swapped, with_code
    from fxsd.tree.places import expression_at
    from fxsd.tree.source import source

    drops = []
    kept = None
    for order, pick in enumerate(picks.split()):
        add, operand = pick.rstrip("*").split(".")
        code, instruction = notes[0 if add == "sum" else int(add)]
        kept = find(cls(), code)
        assert kept is not None
        place = expression_at(kept.function, code, instruction)
        op = f"op_{order}" if order else "op"
        drops.append(Drop((place,), int(operand), op, runs=pick.endswith("*"), several=add == "sum"))
    assert kept is not None
    assert kept.holder is not None
    read = source(kept.function)

    def called(call: ast.Call, inside: Any) -> str:
        raise AssertionError

    before = ast.dump(read.definition, include_attributes=True)
    code = read.edited(lambda definition: change_tree(definition, changes(definition, drops, called)))
    assert ast.dump(read.definition, include_attributes=True) == before, "the tree of the author was changed"
    new = {kept.function: with_code(kept.function, code)}
    own = {name: value for name, value in vars(kept.holder).items() if kept.function in functions_in(value)}
    made = type(cls.__name__, (cls,), {name: swapped(value, new) for name, value in own.items()})
    names = [drop.op for drop in drops]
    found = [run(made, names)]

    text = change_text(read.text, changes(read.definition, drops, called))
    tree = ast.parse("".join(read.text))
    definition = next(
        node
        for node in ast.walk(tree)
        if type(node) is type(read.definition) and (node.lineno, node.col_offset) == (read.definition.lineno, read.definition.col_offset)
    )
    change_tree(definition, changes(definition, drops, called))
    try:
        parsed = ast.parse(text)
    except SyntaxError as error:
        return [*found, f"no Python: {error}\n{text}"]
    if ast.dump(parsed) != ast.dump(tree):
        found.append(f"another tree:\n{text}")
    found.append(run(load(text, folder, name), names))
    return found


def main() -> None:
    root = Path(__file__).parents[2] / "fxsd"
    for name, folder in (("fxsd", root), ("fxsd.tree", root / "tree")):
        stub = types.ModuleType(name)
        stub.__path__ = [str(folder)]
        sys.modules[name] = stub
    with tempfile.TemporaryDirectory() as folder:
        wrong = {
            name: check(way, folder, f"way_{number}") for number, (name, way) in enumerate(WAYS.items()) if sys.version_info >= way.since
        }
    assert "torch" not in sys.modules
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()
