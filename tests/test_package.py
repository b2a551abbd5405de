"""The package as a whole: its public names, and that the README says what is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fxsd
from fxsd import rates

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_all_is_exactly_the_public_surface():
    public = {
        name for name, value in vars(fxsd).items() if not name.startswith("_") and getattr(value, "__module__", "").startswith("fxsd")
    }
    assert public == set(fxsd.__all__)


def test_the_package_says_that_it_is_typed():
    assert (Path(fxsd.__file__).parent / "py.typed").exists()


def test_every_error_is_an_fxsd_error():
    assert issubclass(fxsd.CaptureError, fxsd.FxsdError)


def test_the_code_of_the_readme_runs_and_its_comments_are_true(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)  # trainers make folders
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    fresh = fxsd.transform(names["model"], drop_rate=0.1)
    assert len(fxsd.sites(fresh)) == 16
    assert [fxsd.sites(fresh)[i].drop_rate for i in (0, -1)] == [0.0, 0.1]
    shown = capsys.readouterr().out
    assert "24 sites" in shown
    assert "encoder_pos_embedding" in shown


def test_the_distributions_of_the_readme_are_the_code_s():
    rows = re.findall(r'^\| `"(\w+)"`[^|]*\|[^|]*\| ([\d. ]+) \|', README, re.MULTILINE)
    assert {name for name, _ in rows} == set(rates.NAMED)
    for name, numbers in rows:
        base, weights = rates.weights(0.2, list("abcd"), range(4), name)
        assert [base * w for w in weights] == pytest.approx([float(n) for n in numbers.split()], abs=6e-4)


def test_the_readme_and_the_continuous_integration_share_one_command():
    script = (Path(__file__).parent.parent / ".ci" / "run").read_text()
    assert "<!-- tests -->" in README
    assert "<!-- tests -->" in script


def test_importing_the_package_leaves_torch_as_it_is():
    assert torch.arange(2).tolist() == [0, 1]
    assert "training" not in vars(torch.nn.Module)
