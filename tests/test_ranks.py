"""Training on several ranks: gloo processes on the CPU."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.multiprocessing

WORLD = 2
RUNS: dict[str, dict[str, Any]] = {
    f"{method}-{compute}": {"stochastic_method": method, "compute": compute, "drop_distribution": "uniform"}
    for method, compute in itertools.product(("sample", "block"), ("mask", "skip"))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks.work, (WORLD, str(path), RUNS), nprocs=WORLD)  # type: ignore[no-untyped-call]
    return path


@pytest.mark.parametrize("run", RUNS)
def test_ddp_keeps_parameters_equal_and_uses_all_of_them(run: str, folder: Path) -> None:
    found = [torch.load(folder / f"{run}-{rank}.pt") for rank in range(WORLD)]
    for key in ("parameters", "gradients"):
        assert all(torch.equal(a, b) for a, b in zip(*(rank[key] for rank in found), strict=True)), key
    assert found[0]["losses"] != found[1]["losses"]
    assert found[0]["rates"] == found[1]["rates"] == pytest.approx([0.6] * 3)
