"""What the command lines share: what an argument may be, and whether it can be had here."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fxsd import FxsdError
from fxsd.rates import NAMED
from measure.stepping import Rate


def check(args: argparse.Namespace) -> None:
    """Sets torch's threads, if what is asked for can be had.

    Raises:
        FxsdError: there is no folder for a file, no matplotlib, or no GPU.
    """
    for option in ("json", "plot"):
        target = getattr(args, option, None)
        if target and not Path(target).absolute().parent.is_dir():
            raise FxsdError(f"--{option} must be a file in a folder that exists, but got {target!r}.")
    if getattr(args, "plot", None):
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise FxsdError("--plot needs matplotlib: pip install matplotlib") from error
    if args.device == "cuda" and not torch.cuda.is_available():
        raise FxsdError("--device cuda needs a GPU that torch can use, and there is none.")
    torch.set_num_threads(args.threads)


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, but got {text!r}")
    return int(text)


def shape(text: str) -> list[int]:
    """Whole numbers with an x between them."""
    return [positive(part) for part in text.split("x")]


def probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, but got {text!r}")
    return value


def spread(text: str) -> Rate:
    distribution, colon, rate = text.rpartition(":")
    distribution = distribution if colon else "linear"
    if distribution not in NAMED:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(NAMED)}, a colon and a rate, but got {text!r}")
    return Rate(distribution, probability(rate))
