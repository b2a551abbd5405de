"""Modules whose code holds the op: what runs where a model is transformed.

In: where an add was seen to run, and a tree of modules. Out: the spot in the code where its op is written, or why none can be, and a tree
whose modules have ops in their code.
Above: `graph`, `find`, `capture`, `legal` and the verbs at the top. Below: `run`, whose ops are written. `source`, `places`, `edits` and
`functions` know nothing of torch.
"""

from fxsd.tree.classes import CONSTANTS, Rewritten, Writing, new_class, ops_of
from fxsd.tree.edits import Drop
from fxsd.tree.frames import PLACE, Frames, Whereabouts
from fxsd.tree.objects import Home, original_class, rebuilt
from fxsd.tree.source import NoSource
from fxsd.tree.spots import Spot, spot

__all__ = [
    "CONSTANTS", "PLACE", "Drop", "Frames", "Home", "NoSource", "Rewritten", "Spot", "Whereabouts", "Writing", "new_class", "ops_of",
    "original_class", "rebuilt", "spot",
]  # fmt: skip
