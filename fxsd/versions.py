"""What older versions of torch cannot do. 2.7.0, 2.11.0 and 2.14.1 were tried: what the first lacks is used from the second on."""

from __future__ import annotations

import torch

__all__ = ["HOOKS_NEST", "NO_COND", "SIZES_MOVE", "has_static_value"]

_RECENT = torch.__version__ >= "2.11"

# Is a size a constant of compiled code? 2.7 cannot tell.
if _RECENT:
    from torch.fx.experimental.symbolic_shapes import has_static_value
else:

    def has_static_value(a: object) -> bool:  # type: ignore[misc]
        return False


# Why compiled code cannot leave a branch out, "" if it can: Dynamo of 2.7 does not follow `torch.func.functional_call` into `torch.cond`.
NO_COND = "" if _RECENT else "torch.cond can leave branches out from torch 2.11 on"

# Can a size in a module be a variable of compiled code? Dynamo of 2.7 takes all of those inside `nn.Sequential` and the like for constants,
# so that each rate would be compiled anew.
SIZES_MOVE = _RECENT

# Can hooks of saved tensors call those around them?
HOOKS_NEST = _RECENT
