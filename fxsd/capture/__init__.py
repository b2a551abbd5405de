"""A model's call -> graphs whose train and eval modes stay live.

In: a module and example inputs. Out: a `Captured`: the parts of the model that are graphs, and why the rest is not.
Above: `legal` and the verbs at the top. Below: `find`, `graph` and `run`.
The model is run here, and left exactly as it was.
"""

from fxsd.capture.model import capture
from fxsd.capture.parts import Captured, Part

__all__ = ["Captured", "Part", "capture"]
