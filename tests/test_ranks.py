"""Training on several ranks: gloo processes on the CPU."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessException
from torch.testing import assert_close

MODES: dict[str, dict[str, Any]] = {
    f"{method}-{compute}": {"stochastic_method": method, "compute": compute}
    for method, compute in itertools.product(("sample", "block"), ("mask", "skip"))
}
# Draws that a single process makes too: rates of 0 and 1, or the same on every rank.
CERTAIN: dict[str, dict[str, Any]] = {
    "sample": {"drop_distribution": (1.0, 0.0)},
    "block": {"drop_rate": 0.5, "drop_distribution": "uniform", "sync_ranks": True},
}

TRAINED = {f"train-{mode}": ("train", options) for mode, options in MODES.items()}
SYNCED = {f"outputs-{mode}": ("outputs", options | {"sync_ranks": True}) for mode, options in MODES.items() if mode.startswith("block")}
SHARDED = {
    f"{model}-{mode}-{'whole' if whole else 'blocks'}": ("shard", {"model": model, "whole": whole} | options | CERTAIN[mode.split("-")[0]])
    for (mode, options), (model, whole) in itertools.product(MODES.items(), (("vit", False), ("convolutions", True)))
}
# Ranks that drop different blocks, each of which FSDP gathers and reduces by itself.
APART = {"apart": ("shard", {"model": "vit", "whole": False, "drop_rate": 0.5, "drop_distribution": "uniform"} | MODES["block-skip"])}
RESUMED = {mode: MODES[mode] | {"sync_ranks": mode == "block-skip"} for mode in ("sample-skip", "block-skip")}


def start(folder: Path, jobs: Mapping[int, Mapping[str, tuple[str, dict[str, Any]]]]) -> None:
    torch.multiprocessing.spawn(ranks.work, (str(folder), jobs), nprocs=max(jobs))  # type: ignore[no-untyped-call]


@pytest.fixture(params=[2, 3])
def world(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all ranks wrote, those of 3 first. The last job of those of 2 is killed."""
    path = tmp_path_factory.mktemp("ranks")
    sharded = {name: (job, options | {"path": f"saved-{name}"}) for name, (job, options) in (SHARDED | APART).items()}
    jobs = TRAINED | SYNCED | sharded
    with pytest.raises(ProcessException):
        start(path, {3: jobs, 2: jobs | go_on("whole") | go_on("early", die=True)})
    return path


def go_on(name: str, first: int = 0, die: bool = False) -> dict[str, tuple[str, dict[str, Any]]]:
    """Jobs that save half-way, those that are killed under a name for those that go on from there."""
    path = "whole" if name == "whole" else "killed"
    return {
        f"{name}-{mode}": ("go_on", options | {"path": f"{path}-{mode}", "first": first, "die": die and mode == "block-skip"})
        for mode, options in RESUMED.items()
    }


def results(folder: Path, world: int, name: str) -> list[Any]:
    return [torch.load(folder / str(world) / f"{name}-{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("mode", MODES)
def test_ddp_keeps_parameters_equal_and_uses_all_of_them(mode: str, world: int, folder: Path) -> None:
    first, *others = results(folder, world, f"train-{mode}")
    for other in others:
        for key in ("parameters", "gradients"):
            assert len(first[key]) == 18
            assert all(torch.equal(a, b) for a, b in zip(first[key], other[key], strict=True)), key
        assert first["losses"] != other["losses"]
        assert first["rates"] == other["rates"] == pytest.approx([0.6] * 3)


@pytest.mark.parametrize("compute", ["mask", "skip"])
def test_sites_that_are_in_step_draw_the_same_on_all_ranks(compute: str, world: int, folder: Path) -> None:
    first, *others = (torch.stack(found) for found in results(folder, world, f"outputs-block-{compute}"))
    for other in others:
        assert torch.equal(first, other)
    assert 4 <= len(first[:, 0].unique(dim=0)) <= 8  # of the 8 that three sites can draw


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp_trains_as_one_process_does(name: str, world: int, folder: Path) -> None:
    _, options = SHARDED[name]
    gm, x = ranks.made(options["model"], {key: value for key, value in options.items() if key not in ("model", "whole")})
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    ranks.fit(gm, x)
    assert any(not torch.equal(before[key], value) for key, value in gm.state_dict().items())
    for found in results(folder, world, name):
        assert_close(found["trained"], dict(gm.state_dict()), rtol=1e-9, atol=1e-9)


def test_fsdp_waits_for_no_rank_that_drops_another_block(world: int, folder: Path) -> None:
    first, *others = results(folder, world, "apart")
    for other in others:
        assert_close(first["trained"], other["trained"], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process reads what several wrote
@pytest.mark.parametrize("name", SHARDED)
def test_a_distributed_checkpoint_is_the_original_s(name: str, world: int, folder: Path) -> None:
    torch.manual_seed(2)
    model, _ = ranks.MODELS[SHARDED[name][1]["model"]][0]()
    state = model.double().state_dict()
    (found, *_) = results(folder, world, name)
    assert found["keys"] == list(state)
    assert_close(found["loaded"], found["trained"], rtol=0, atol=0)
    dcp.load(state, checkpoint_id=folder / str(world) / f"saved-{name}")
    assert_close(dict(state), found["trained"], rtol=0, atol=0)


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(folder: Path) -> None:
    start(folder, {2: go_on("late", first=ranks.SAVED_STEP)})
    for mode in RESUMED:
        for before, after in zip(results(folder, 2, f"whole-{mode}"), results(folder, 2, f"late-{mode}"), strict=True):
            assert after == before[ranks.SAVED_STEP :]
    assert not list((folder / "2").glob("early-block-skip-*"))


def test_the_script_of_the_readme_runs(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    (script,) = re.findall(r"<!-- train.py -->\n```py\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^step (\d+): \d+\.\d+$", done.stdout, re.MULTILINE) == [str(step) for step in range(20)]
    assert [path.parent.name for path in sorted(tmp_path.glob("checkpoints/*/.metadata"))] == ["000010", "000020"]
