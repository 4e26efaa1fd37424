"""What can be asked of the command: subcommands, their arguments, and what these turn into."""

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, final

from symflow import __version__
from symflow.arch.mlp import ACTIVATIONS
from symflow.cli import commands

_TASK = "such as digits or breast_cancer, or a folder of IDX files"


@final
class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"symflow: error: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser; what it parses has the function to call as ``run``."""
    top = _Parser("symflow", description="Networks modulo their symmetries.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"symflow {__version__}")
    subcommands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(run: Callable[..., None], *files: str) -> argparse.ArgumentParser:
        text = run.__doc__
        made = subcommands.add_parser(run.__name__, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=run)
        for file in files:
            made.add_argument(file, type=Path, metavar=file.upper(), help="safetensors file")
        return made

    _add_architecture(command(commands.inspect, "file"))
    for run in (commands.align, commands.distance, commands.interpolate):
        made = command(run, "a", "b")
        if run is not commands.distance:
            made.add_argument(
                *("-o", "--out"), type=Path, metavar="OUT", required=True, help="file to write"
            )
        if run is commands.interpolate:
            _add_times(made)
        _add_section(made)
        _add_architecture(made)
    made = command(commands.barrier, "a", "b")
    _add_barrier(made)
    _add_section(made)
    _add_architecture(made)
    made = command(commands.merge)
    _add_merge(made)
    _add_section(made)
    _add_architecture(made)
    _add_demo(command(commands.demo))
    return top


def _add_barrier(made: argparse.ArgumentParser) -> None:
    made.add_argument("--task", required=True, metavar="NAME", help=_TASK)
    made.add_argument(
        "--split", choices=["train", "test"], default="train", help="of the task (default: train)"
    )
    made.add_argument(
        "--points", type=_points, default=11, help="of each path, ends included (default: 11)"
    )
    made.add_argument(
        "--reset", action="store_true", help="BatchNorm statistics of the points in between"
    )
    made.add_argument(
        "--temperature",
        action="store_true",
        help="divide logits in between by the temperature that is best half way",
    )
    made.add_argument("--plot", type=Path, metavar="FILE", help="picture to write, such as p.png")


def _add_merge(made: argparse.ArgumentParser) -> None:
    made.add_argument("files", type=Path, nargs="+", metavar="FILE", help="safetensors files")
    made.add_argument(
        *("-o", "--out"), type=Path, metavar="OUT", required=True, help="file to write"
    )
    made.add_argument("--task", metavar="NAME", help=f"reset BatchNorm statistics on it; {_TASK}")


def _add_times(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        *("-t", "--time"),
        dest="times",
        type=_time,
        action="append",
        metavar="T",
        help="from 0, which is A, to 1, which is B next to it (default: 0.5); for several, each "
        f"with its own -t, OUT has {commands.TIME} in its name or is a folder",
    )


def _add_section(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--section",
        choices=["auto", "balanced", "sphere", "none"],
        default="auto",
        help="how scales are chosen (default: balanced where there are any)",
    )


def _add_architecture(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group(
        "architecture", "By default that of an MLP, if the leaves are those of one."
    )
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--module",
        type=_factory,
        metavar="PKG:FACTORY",
        help="a callable that returns a module, (module, example input) or an Architecture",
    )
    kind.add_argument("--mlp", type=_sizes, metavar="WIDTHS", help="such as 30,16,16,2")
    group.add_argument(
        "--activation",
        choices=sorted(ACTIVATIONS),
        help="of an MLP; needed to write files, else relu is assumed",
    )
    group.add_argument("--input", type=_sizes, metavar="SHAPE", help="of the module, as 1,784")


def _add_demo(made: argparse.ArgumentParser) -> None:
    made.add_argument("-o", "--out", type=Path, metavar="OUT", default=Path("report.html"))
    made.add_argument("--folder", type=Path, help="where the networks are kept and found again")
    made.add_argument("--seed", type=int, default=0, help="of all randomness (default: 0)")
    made.add_argument("--fast", action="store_true", help="less of everything")


# ---------------------------------------------------------------- from text


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"wanted positive sizes such as 30,16,2, got {text!r}")
    return sizes


def _points(text: str) -> int:
    if not text.isdecimal() or int(text) < 3 or int(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"wanted an odd number from 3 on, got {text!r}")
    return int(text)


def _time(text: str) -> float:
    try:
        t = float(text)
    except ValueError:
        t = math.nan
    if not 0 <= t <= 1:
        raise argparse.ArgumentTypeError(f"wanted a time from 0 to 1, got {text!r}")
    return abs(t)  # -0.0 is one of them


def _factory(text: str) -> Callable[[], Any]:
    """Import ``package.module:factory``, from the working directory too."""
    name, _, attribute = text.partition(":")
    if not name or not attribute:
        raise argparse.ArgumentTypeError(f"wanted package.module:factory, got {text!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a user's module may fail with anything
        raise argparse.ArgumentTypeError(f"cannot import {name!r} ({error})") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise argparse.ArgumentTypeError(f"{name!r} has no callable {attribute!r}")
    return found
