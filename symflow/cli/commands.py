"""The subcommands: each reads files, calls the library, and shows or writes what comes back."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symflow.align import objective
from symflow.arch import Architecture
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


def barrier(args: argparse.Namespace) -> None:
    """Show loss and accuracy between A and B, on the straight line and aligned."""
    from symflow.evaluate import compared  # brings scikit-learn with it
    from symflow.zoo import task

    _refuse_inputs(args, [] if args.plot is None else [args.plot])
    if args.plot is not None:
        from symflow.cli.plot import require_picture  # brings matplotlib with it

        require_picture(args.plot)
    quotient, (w0, w1), _ = _pair(args)
    data = task(args.task)
    found = compared(
        *(quotient, w0, w1, data, args.split),
        points=args.points,
        reset=data if args.reset else None,
        temperature="midpoint" if args.temperature else None,
        accuracies=True,
        progress=True,
    )
    paths = {"raw": found.naive, "aligned": found.aligned}
    columns: list[Tensor] = [found.naive.times]
    for path in paths.values():
        columns += [path.losses, path.losses if path.accuracies is None else path.accuracies]
    rows = [[_number(x) for x in row] for row in zip(*columns, strict=True)]
    head = ["t", *(f"{what}, {name}" for name in paths for what in ("loss", "accuracy"))]
    facts: list[tuple[str, str]] = []
    for name, path in paths.items():
        facts += [(f"barrier, {name}", _number(path.height))]
        facts += [(f"excess half way, {name}", _number(path.midpoint))]
        if path.temperature is not None:
            facts += [(f"temperature, {name}", _number(path.temperature))]
    facts += [("data", f"{args.split} split of {data.name}")]
    facts += _statistics(quotient.arch, "reset" if args.reset else "interpolated")
    _write(_table(rows, head=head), "", _table(facts))
    if args.plot is not None:
        from symflow.cli.plot import draw_paths

        draw_paths(args.plot, found.naive.times, {k: p.losses for k, p in paths.items()})
        _write(f"wrote {args.plot}")


def merge(args: argparse.Namespace) -> None:
    """Write the mean of networks modulo symmetries, under the keys and dtypes of the first."""
    if len(args.files) < 2:
        raise argparse.ArgumentError(None, "give two networks or more to merge")
    _refuse_inputs(args, [args.out])
    files = [Checkpoint.read(file) for file in args.files]
    quotient = _quotient(args, files[0])
    w = torch.stack([file.weights(quotient.arch) for file in files])
    data = None
    if args.task is not None:
        from symflow.zoo import task  # brings scikit-learn with it

        data = task(args.task)
    mean = quotient.mean(w, progress=True)
    distances = quotient.distance(mean, w)
    told = "averaged"
    if data is not None:
        from symflow.evaluate import reset_normalisation

        mean, told = reset_normalisation(quotient.arch, mean, data), "reset"
    files[0].replaced(quotient.arch, mean).write(args.out)
    rows = [
        [str(file.path), _number(d), *_measured(quotient.arch, point, data)]
        for file, d, point in zip(files, distances, w, strict=True)
    ]
    rows += [["mean", "0", *_measured(quotient.arch, mean, data)]]
    measured = [] if data is None else ["test loss", "test accuracy"]
    facts = [*_statistics(quotient.arch, told), ("networks", str(len(files)))]
    head = ["network", "distance to the mean", *measured]
    _write(_table(rows, head=head), "", _table(facts), f"wrote {args.out}")


def demo(args: argparse.Namespace) -> None:
    """Train, align and generate networks, and write a report about them."""
    from symflow.report import demo as run  # brings scikit-learn and matplotlib with it

    run(args.out, folder=args.folder, seed=args.seed, fast=args.fast)


# ---------------------------------------------------------------- in and out


def _pair(
    args: argparse.Namespace,
) -> tuple[Quotient, tuple[Tensor, Tensor], tuple[Checkpoint, Checkpoint]]:
    a, b = Checkpoint.read(args.a), Checkpoint.read(args.b)
    quotient = _quotient(args, a)
    return quotient, (a.weights(quotient.arch), b.weights(quotient.arch)), (a, b)


def _quotient(args: argparse.Namespace, a: Checkpoint) -> Quotient:
    arch, told = find_architecture(args, a.tensors)
    if arch is None:
        raise argparse.ArgumentError(None, f"{a.path}: {told}")
    # Scales and signs of another activation change the function: a number can be read with that in
    # mind, a network that is written cannot.
    assumed = told.endswith(ASSUMED)
    if assumed and args.mlp is None and hasattr(args, "out"):
        raise argparse.ArgumentError(
            None,
            f"{a.path} does not tell its activation, and with another one what is written "
            "would be another function: give --activation, such as --activation relu (or --module)",
        )
    quotient = Quotient(arch, None if args.section == "none" else args.section)
    if assumed:
        sys.stderr.write(f"symflow: note: {told}\n")
    return quotient


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
    inputs = args.files if "files" in args else (args.a, args.b)
    for out in outs:
        if any(p.exists() and out.exists() and p.samefile(out) for p in inputs):
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


def _statistics(arch: Architecture, told: str) -> list[tuple[str, str]]:
    """Say what was done with running statistics, if there are any."""
    where = " on training inputs" if told == "reset" else ""
    has_any = any(not leaf.learnable for leaf in arch.leaves)
    return [("statistics", told + where)] if has_any else []


def _measured(arch: Architecture, w: Tensor, data: Any) -> list[str]:
    """Loss and accuracy on test data, if there is any."""
    if data is None:
        return []
    from symflow.evaluate import accuracy, loss

    return [_number(measure(arch, w, data)) for measure in (loss, accuracy)]


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
