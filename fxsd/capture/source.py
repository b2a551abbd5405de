"""Which line of the model's own code is running, or failed."""

from __future__ import annotations

import traceback

_INNER = (
    "/fxsd/capture/", "/torch/fx/", "/torch/nn/modules/module.py", "/torch/_", "/torch/utils/", "/torch/functional.py",
    "/torch/overrides.py", "/torch/_higher_order_ops/",
)  # fmt: skip


def this_line() -> str:
    """The line of the model's code that is being traced."""
    frame = _of_model(traceback.extract_stack())
    return f"`{(frame.line or '').strip()}` ({frame.filename}:{frame.lineno})" if frame else "a decision"


def failing_line(error: BaseException) -> str:
    """The line of the model's code that raised `error`."""
    frame = _of_model(traceback.extract_tb(error.__traceback__))
    return f"{frame.filename}:{frame.lineno}, `{(frame.line or '').strip()}`" if frame else "its code"


def _of_model(frames: traceback.StackSummary) -> traceback.FrameSummary | None:
    return next((frame for frame in reversed(frames) if not any(part in frame.filename for part in _INNER)), None)
