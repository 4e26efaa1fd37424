"""The subcommands: each reads files, calls the library, and shows or writes what comes back."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from symflow.align import objective
from symflow.cli.networks import ASSUMED, Checkpoint, find_architecture
from symflow.quotient import Quotient

# Stands for the time in the name of a file.
TIME = "{t}"
_SUFFIX = ".safetensors"


def inspect(args: argparse.Namespace) -> None:
    """Show leaves, symmetries and norms of a network."""
    network = Checkpoint.read(args.file)
    arch, told = find_architecture(args, network.tensors)
    if arch is None:
        rows = [_described(name, x) for name, x in sorted(network.tensors.items())]
        _write(_table(rows, head=("tensor", "shape", "dtype")), "", told)
        return
    w = network.weights(arch)
    rows = [
        [
            *_described(leaf.name, leaf.of(network.tensors[leaf.key])),
            " x ".join(d.axis or "-" for d in leaf.dims) or "-",
            _number(w[leaf.span].norm()),
        ]
        for leaf in arch.leaves
    ]
    learnable = slice(arch.num_parameters)
    facts = [
        ("parameters", str(arch.num_parameters)),
        ("norm", _number(w[learnable].norm())),
        ("norm, balanced", _number(Quotient(arch).project(w)[learnable].norm())),
    ]
    leaves = _table(rows, head=("leaf", "shape", "dtype", "axes", "norm"))
    _write(told, "", leaves, "", str(arch.symmetry), "", _table(facts))


def align(args: argparse.Namespace) -> None:
    """Write B as it is closest to A: moved along its orbit, with the scales of the section."""
    _refuse_inputs(args, [args.out])
    quotient, (w0, w1), (_, b) = _pair(args)
    found = quotient.align(w0, w1, bounds=True)
    b.replaced(quotient.arch, found.weights).write(args.out)
    x0, x1 = quotient.project(w0), quotient.project(w1)
    rows = [
        ("objective before", _number(objective(quotient.symmetry, x0, x1))),
        ("objective", _number(found.objective)),
        ("objective is at most", _number(found.objective_bound)),
        ("distance before", _number(quotient.manifold.dist(x0, x1))),
        *_distances(quotient, w0, w1),
        ("search ended at", found.status.value),
    ]
    _write(_table(rows), f"wrote {args.out}")


def distance(args: argparse.Namespace) -> None:
    """Show the distance of A and B modulo symmetries, and bounds of it."""
    quotient, (w0, w1), _ = _pair(args)
    _write(_table(_distances(quotient, w0, w1)))


def interpolate(args: argparse.Namespace) -> None:
    """Write points of the geodesic from A to B."""
    times = sorted(set(args.times or [0.5]))
    outs = [_out(args.out, t, alone=len(times) == 1) for t in times]
    _refuse_inputs(args, outs)
    quotient, (w0, w1), (a, _) = _pair(args)
    path = quotient.geodesic(w0, w1)
    made = [a.replaced(quotient.arch, path(t)) for t in times]  # all of them, or none is written
    for point, out in zip(made, outs, strict=True):
        point.write(out)
        _write(f"wrote {out}")
    _write(f"length {_number(path.length)}")


def demo(args: argparse.Namespace) -> None:
    """Train, align and generate networks, and write a report about them."""
    from symflow.report import demo as run  # brings scikit-learn and matplotlib with it

    run(args.out, folder=args.folder, seed=args.seed, fast=args.fast)


# ---------------------------------------------------------------- in and out


def _pair(
    args: argparse.Namespace,
) -> tuple[Quotient, tuple[Tensor, Tensor], tuple[Checkpoint, Checkpoint]]:
    a, b = Checkpoint.read(args.a), Checkpoint.read(args.b)
    arch, told = find_architecture(args, a.tensors)
    if arch is None:
        raise argparse.ArgumentError(None, f"{args.a}: {told}")
    # Scales and signs of another activation change the function: a number can be read with that in
    # mind, a network that is written cannot.
    assumed = told.endswith(ASSUMED)
    if assumed and args.mlp is None and hasattr(args, "out"):
        raise argparse.ArgumentError(
            None,
            f"{args.a} does not tell its activation, and with another one what is written "
            "would be another function: give --activation, such as --activation relu (or --module)",
        )
    quotient = Quotient(arch, None if args.section == "none" else args.section)
    weights = a.weights(arch), b.weights(arch)
    if assumed:
        sys.stderr.write(f"symflow: note: {told}\n")
    return quotient, weights, (a, b)


def _out(out: Path, t: float, *, alone: bool) -> Path:
    """Return the file for a time: OUT itself, OUT with the time in it, or a file in OUT."""
    if TIME in str(out):
        return Path(str(out).replace(TIME, str(t)))
    if out.is_dir() or not (alone or out.suffix):
        return out / f"{t}{_SUFFIX}"
    if not alone:
        raise argparse.ArgumentError(
            None, f"several -t, one OUT: put {TIME} into {str(out)!r}, or name a folder"
        )
    return out


def _refuse_inputs(args: argparse.Namespace, outs: Iterable[Path]) -> None:
    for out in outs:
        if any(p.exists() and out.exists() and p.samefile(out) for p in (args.a, args.b)):
            raise argparse.ArgumentError(None, f"{out} is an input and stays: give another -o")


# ---------------------------------------------------------------- what is shown


def _distances(quotient: Quotient, w0: Tensor, w1: Tensor) -> list[tuple[str, str]]:
    lower, upper = quotient.distance_bounds(w0, w1)
    gap = float((upper - lower) / upper) if float(upper) > 0 else 0.0
    learnable = slice(quotient.arch.num_parameters)
    section = type(quotient.section).__name__.removesuffix("Section").lower()
    return [
        ("distance", _number(upper)),
        ("distance is at least", _number(lower)),
        ("relative gap", f"{gap:.2%}"),
        ("raw distance", _number((w0 - w1)[learnable].norm())),
        ("section", "none" if section == "flat" else section),
    ]


def _described(name: str, x: Tensor) -> tuple[str, str, str]:
    return name, " x ".join(map(str, x.shape)) or "-", str(x.dtype).removeprefix("torch.")


def _number(x: Tensor | None) -> str:
    return "-" if x is None else f"{float(x):.6g}"


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Columns, each as wide as its widest cell; a head gets a rule below it."""
    cells = [*([head] if head else []), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    if head:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _write(*blocks: str) -> None:
    sys.stdout.write("\n".join(blocks) + "\n")
