"""What several test files share."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two workers share the machine

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def tool(request):
    """The module in tools/ that a test file is named after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        (file,) = TOOLS.rglob(f"{Path(request.path).stem.removeprefix('test_')}.py")
        yield importlib.import_module(".".join(file.relative_to(TOOLS).with_suffix("").parts))
