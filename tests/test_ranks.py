"""Training on several ranks: gloo processes on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.multiprocessing

WORLD = 2


@pytest.mark.parametrize("compute", ["mask", "skip"])
@pytest.mark.parametrize("method", ["sample", "block"])
def test_ddp_keeps_parameters_equal_and_uses_all_of_them(method: str, compute: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"stochastic_method": method, "compute": compute, "drop_distribution": "uniform"}
    torch.multiprocessing.spawn(ranks.train, (WORLD, str(tmp_path), options), nprocs=WORLD)  # type: ignore[no-untyped-call]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for key in ("parameters", "gradients"):
        assert all(torch.equal(a, b) for a, b in zip(*(rank[key] for rank in found), strict=True)), key
    assert found[0]["losses"] != found[1]["losses"]
    assert found[0]["rates"] == found[1]["rates"] == pytest.approx([0.6] * 3)
