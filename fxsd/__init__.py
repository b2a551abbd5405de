"""fxsd adds stochastic depth to any PyTorch model by rewriting its graph.

>>> import fxsd, torchvision
>>> gm = fxsd.transform(torchvision.models.resnet50(), drop_rate=0.1)
>>> len(fxsd.sites(gm))
16
"""

from fxsd.errors import CaptureError, FxsdError
from fxsd.find.residual import RejectedAdd
from fxsd.pipeline import analyze, transform
from fxsd.report import Analysis
from fxsd.schedule import DropRateSchedule
from fxsd.site import ResidualSite, set_drop_rate, sites
from fxsd.written import source

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "CaptureError",
    "DropRateSchedule",
    "FxsdError",
    "RejectedAdd",
    "ResidualSite",
    "analyze",
    "set_drop_rate",
    "sites",
    "source",
    "transform",
]
