"""A graph -> its residual adds. Pure reading: nothing is run or changed.

In: an `fx.Graph` and the modules that it calls. Out: `Found`: residual adds with branch, shortcut and fork, every other add with the reason
that it is none, and the depth of each.
Above: `graph`, `capture`, `legal` and the verbs at the top. Below: `tree` and `run`, whose op it knows.
"""

from fxsd.find.depth import depths, execution_order, prefixes
from fxsd.find.residual import Found, RejectedAdd, Residual, operands
from fxsd.find.residual import find as find_residuals
from fxsd.find.values import kinds, op_name

__all__ = [
    "Found", "RejectedAdd", "Residual", "depths", "execution_order", "find_residuals", "kinds", "op_name", "operands", "prefixes",
]  # fmt: skip
