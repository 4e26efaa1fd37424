"""What is found in the architectures that people have. Writes architectures.json.

Each row: the groups found and those expected (worked out by hand in tests/catalogue.py), how well
the function is kept, the time to derive; and the dimension of the continuous symmetry that was
found beside the nullity of the Jacobian of the outputs by the parameters, at random weights and on
more inputs than parameters. The nullity counts all directions that do not move the outputs, also
those that are no symmetry of the architecture but of these weights (a unit that is off) or of
evaluation mode. Its excess is explained, one kind after the other: for each kind the null space is
cut with the span of its directions, and what is new is counted.
"""

import itertools
import sys
import time
import warnings
from typing import Any

import record
import scipy.linalg
import torch
from torch import Tensor
from torch.func import jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from symflow.arch import Architecture, Shifts
from symflow.arch.running import tensors_of
from symflow.groups import DiagonalGroup, Group, MatrixGroup, NoncompactGroup, PairGroup

sys.path.insert(0, str(record.ROOT / "tests"))
from catalogue import CATALOGUE, Entry, told

SEED = 0
DRAWS = 5
# Singular values below this share of the largest count as zero; columns have norm one.
NULL = 1e-9
# One scale of a residual stream is seen by the eps of norms alone, which others nearly make good.
SLACK = {"uniform": 1e-6}
# Half of a finite difference along the group.
STEP = 1e-6
# Random weights tried until nothing is left unexplained; the least nullity is stored.
TRIES = 40
# Outputs for each parameter: logits of all words show a few units only, so that more are needed
# where inputs are words.
OUTPUTS, WORDS = 3, 12
JACOBIAN = 3000  # parameters up to which the nullity is computed
# Leaves of networks in which maps follow, or stand beside, each other without anything between.
PRODUCTS = {
    "low-rank factors": ("base.weight", "down", "up"),
    "linear network": tuple(f"{k}.{name}" for k in range(4) for name in ("weight", "bias")),
}
KINDS = {
    "shifts": "translations that arch.Shifts finds and a quotient can take away",
    "unused": "weights that no output depends on here: units that are off, words not drawn",
    "alone": "directions of one leaf that nothing shows: it reads few inputs, or what a norm has "
    "centred, or writes what a norm subtracts",
    "bias": "directions of a weight that add a constant, and its bias: it reads what a norm has "
    "centred",
    "norm": "in evaluation mode BatchNorm is an affine map: what is before it can be scaled and "
    "shifted against it",
    "translation": "biases, embeddings and shifts that add up, also through a linear map; biases "
    "of keys, which a softmax does not see",
    "uniform": "one scale of all units at once, from one leaf to the next",
    "centring": "a constant added to all units that a norm centres, with what adds up to it",
    "rotation": "a linear map of the units that a norm sees, in each leaf by itself: norms "
    "commute with rotations of a stream (about its mean), gains aside, as in arch.fold_gains",
    "products": "a matrix beside, or behind, a product of two: within the leaves of these",
}


def measure(entry: Entry) -> dict[str, Any]:
    """Derive, try, and count."""
    torch.manual_seed(SEED)
    module = entry.make()
    start = time.perf_counter()
    arch = Architecture.from_module(module, *entry.inputs)
    seconds = time.perf_counter() - start
    generator = torch.Generator().manual_seed(SEED)
    w = arch.flatten(module.double())
    count = arch.num_parameters
    w[:count] += torch.randn(count, generator=generator, dtype=torch.float64) / 3
    inputs = draw(entry, generator)
    before = arch.apply(w, *inputs)
    g = arch.symmetry.random(generator=generator, like=w, batch=(DRAWS,))
    change = float((arch.apply(arch.symmetry.act(g, w), *inputs) - before).abs().max())
    found = [told(axis) for axis in arch.axes]
    total, parts = None, {}
    if count <= JACOBIAN:
        total, parts = explained(arch, w, entry, generator)
        for _ in range(TRIES - 1):  # units that are always on make more directions, by chance
            if not parts["unexplained"]:
                break
            fresh = arch.flatten(entry.make().double())
            fresh[:count] += torch.randn(count, generator=generator, dtype=torch.float64) / 3
            again = explained(arch, fresh, entry, generator)
            total, parts = min((total, parts), again, key=lambda found: found[0])
    relative = change / float(before.abs().max())
    bound = entry.rounding
    row = record.judged(entry.name, "relative_change", [relative], at_most=bound)
    return row | {
        "parameters": count,
        "found": found,
        "expected": list(entry.axes),
        "continuous_dimension": arch.symmetry.dimension,
        "jacobian_nullity": total,
        "excess_by_kind": parts,
        "excess_explained": sum(n for kind, n in parts.items() if kind != "unexplained"),
        "why": {kind: KINDS[kind] for kind, n in parts.items() if n and kind in KINDS},
        "rounding": "float64" if bound < 1e-6 else "the module casts to float32 inside: 1e-5",
        "derive_seconds": round(seconds, 4),
        "in_readme": False,
    }


def draw(entry: Entry, generator: torch.Generator) -> list[Tensor]:
    """Draw inputs like the example's; integers are drawn from those that occur and zero."""
    found = []
    for x in entry.inputs:
        if x.is_floating_point():
            found.append(torch.randn(x.shape, generator=generator, dtype=torch.float64))
        else:
            found.append(torch.randint(int(x.max()) + 1, x.shape, generator=generator))
    return found


def jacobian(arch: Architecture, w: Tensor, entry: Entry, generator: torch.Generator) -> Tensor:
    """Differentiate all outputs by the parameters, on more inputs than there are parameters."""
    count = arch.num_parameters
    rows = torch.zeros(0, count, dtype=torch.float64)
    learnable = {leaf.key for leaf in arch.leaves if leaf.learnable}
    fixed = {k: v for k, v in arch.state_dict(w).items() if k not in learnable}
    fixed = {k: v for k, v in fixed.items() if k not in dict(arch.aliases)}
    scales = itertools.cycle((1.0, 3.0, 10.0))  # units that are off on small inputs
    wanted = count * (OUTPUTS if all(x.is_floating_point() for x in entry.inputs) else WORDS)
    while len(rows) < wanted:
        scale = next(scales)
        inputs = [x * scale if x.is_floating_point() else x for x in draw(entry, generator)]

        def outputs(v: Tensor, inputs: list[Tensor] = inputs) -> Tensor:
            state = arch.state_dict(torch.cat([v, w[count:]])) | fixed
            result = torch.func.functional_call(arch.module, state, tuple(inputs))
            return torch.cat([x.reshape(-1) for x in tensors_of(result)])

        rows = torch.cat([rows, jacrev(outputs)(w[:count]).reshape(-1, count)])
    return torch.linalg.qr(rows, mode="r").R  # the same null space, of a fraction of the rows


def explained(
    arch: Architecture, w: Tensor, entry: Entry, generator: torch.Generator
) -> tuple[int, dict[str, int]]:
    """Return the nullity of the Jacobian, and how much of its excess each kind explains."""
    # The fused attention has no rule for many rows at once: they would be taken one by one.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        slope = jacobian(arch, w, entry, generator)
    null = invisible(slope)
    found = tangent(arch, w)
    outside = (found - found @ null.mT @ null).norm(dim=1)
    if bool((outside > 1e-5 * found.norm(dim=1)).any()):
        raise AssertionError(f"{entry.name}: a direction of the group moves the outputs")
    have, parts = independent(found), {}
    added = translations(arch, w)
    if len(added) and bool((added - added @ null.mT @ null).norm(dim=1).max() > 1e-5):
        raise AssertionError(f"{entry.name}: a translation moves the outputs")
    more = independent(torch.cat([have, added]))
    parts["shifts"] = len(more) - len(have)
    have = more
    for kind, span in spans(arch, entry, w, slope).items():
        inside = null @ independent(span).mT
        left, cosines, _ = decomposed(inside)
        shared = left[:, cosines > 1 - SLACK.get(kind, NULL)].mT @ null
        more = independent(torch.cat([have, shared]))
        parts[kind] = len(more) - len(have)
        have = more
    parts["unexplained"] = len(null) - len(have)
    return len(null), parts


def invisible(slope: Tensor, largest: float | None = None) -> Tensor:
    """Return an orthonormal basis of the directions that a Jacobian does not see."""
    _, values, basis = decomposed(slope, full=True)
    values = torch.cat([values, values.new_zeros(max(0, len(basis) - len(values)))])
    return basis[values <= NULL * (values.max() if largest is None else largest)]


def decomposed(rows: Tensor, *, full: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition.

    The fast driver fails on some matrices with many equal singular values; the slow one does not.
    """
    try:
        return torch.linalg.svd(rows, full_matrices=full)
    except torch.linalg.LinAlgError:
        parts = scipy.linalg.svd(rows.numpy(), full_matrices=full, lapack_driver="gesvd")
        left, values, right = (torch.from_numpy(part) for part in parts)
        return left, values, right


def independent(rows: Tensor) -> Tensor:
    """Return an orthonormal basis of what rows span."""
    length = rows.norm(dim=1, keepdim=True)
    rows = (rows / length.clamp_min(1e-30))[length.squeeze(1) > 0]
    if not len(rows):
        return rows
    _, values, basis = decomposed(rows)
    return basis[values > 1e-6 * values.max()]


def tangent(arch: Architecture, w: Tensor) -> Tensor:
    """Return the directions in which the group moves parameters, by central differences."""
    symmetry, count = arch.symmetry, arch.num_parameters
    rows = [torch.zeros(0, count, dtype=torch.float64)]
    identity = symmetry.identity(like=w)
    for axis in symmetry.axes:
        for path, step in steps(axis.group, identity[axis.name]):
            ends = []
            for sign in (1, -1):
                g = dict(identity) | {
                    axis.name: moved(identity[axis.name], path, sign * STEP * step)
                }
                ends.append(symmetry.act(g, w)[:count])
            rows.append((ends[0] - ends[1])[None] / (2 * STEP))
    return torch.cat(rows)


def translations(arch: Architecture, w: Tensor) -> Tensor:
    """Return an orthonormal basis of what can be added to parameters."""
    eye = torch.eye(arch.dimension, dtype=w.dtype)[: arch.num_parameters]
    return independent((eye - Shifts.find(arch).centre(eye))[:, : arch.num_parameters])


def steps(group: Group[Any], g: Any, path: tuple[int, ...] = ()) -> list[tuple[Any, Tensor]]:
    """Return a basis of the directions in which an element can move continuously."""
    if hasattr(group, "factors"):
        return [
            step
            for k, factor in enumerate(group.factors)
            for step in steps(factor, g[k], (*path, k))
        ]
    if not group.dimension:
        return []
    found = []
    for k in range(g.numel()):
        step = torch.zeros_like(g).reshape(-1)
        step[k] = 1
        step = step.reshape(g.shape)
        if isinstance(group, MatrixGroup) and not isinstance(group, NoncompactGroup):
            step = step - step.mT
        found.append((path, step))
    if not isinstance(group, DiagonalGroup | MatrixGroup | PairGroup):
        raise TypeError(f"no directions of {group} are known")
    return found


def moved(g: Any, path: tuple[int, ...], step: Tensor) -> Any:
    """Add a step to one part of an element."""
    if not path:
        return g + step
    return tuple(moved(x, path[1:], step) if k == path[0] else x for k, x in enumerate(g))


def spans(arch: Architecture, entry: Entry, w: Tensor, slope: Tensor) -> dict[str, Tensor]:
    """Return what directions of each kind span, some of which do not move the outputs."""
    count = arch.num_parameters
    eye = torch.eye(count, dtype=torch.float64)
    size = slope.norm(dim=0)
    vectors, constants, norms = [], [], []
    for leaf in arch.leaves:
        if not leaf.learnable:
            continue
        places = torch.arange(leaf.size).reshape(leaf.shape) + leaf.offset
        stored = leaf.stored or leaf.shape
        if len(stored) < 2 or stored[0] == 1 or _is_table(arch, leaf.key):
            vectors.append(eye[leaf.span])
        for k in range(len(leaf.shape)):
            rest = places.movedim(k, 0).reshape(leaf.shape[k], -1)
            direction = torch.zeros(rest.shape[1], count, dtype=torch.float64)
            direction.scatter_(1, rest.mT, 1.0)
            constants.append(direction)
        rows = places.reshape(places.shape[0], -1)  # one unit's own weights, as they are
        direction = torch.zeros(len(rows), count, dtype=torch.float64)
        norms.append(direction.scatter_(1, rows, w[rows]))
    flat = torch.cat(vectors) if vectors else eye[:0]
    learnable = [leaf for leaf in arch.leaves if leaf.learnable]
    whole = torch.zeros(len(learnable), count, dtype=torch.float64)
    for k, leaf in enumerate(learnable):
        whole[k, leaf.span] = w[leaf.span]
    batch_norm = any("running_var" in leaf.name for leaf in arch.leaves)
    alone, pairs = [eye[:0]], [eye[:0]]
    for leaf in learnable:
        alone.append(invisible(slope[:, leaf.span], float(size.max())) @ eye[leaf.span])
        stem, is_weight = leaf.key.removesuffix("weight"), leaf.key.endswith("weight")
        biases = [eye[x.span] for x in learnable if is_weight and x.key == f"{stem}bias"]
        if biases:
            both = torch.cat([eye[leaf.span], *biases])
            pairs.append(invisible(slope @ both.mT, float(size.max())) @ both)
    products = [eye[leaf.span] for leaf in learnable if leaf.key in PRODUCTS.get(entry.name, ())]
    return {
        "unused": eye[size <= NULL * size.max()],
        "alone": torch.cat(alone),
        "bias": torch.cat(pairs),
        "norm": torch.cat([flat, *norms]) if batch_norm else eye[:0],
        "translation": flat,
        "uniform": whole,
        "centring": torch.cat([flat, *constants]),
        "rotation": torch.cat([eye[:0], *rotations(arch, w)]),
        "products": torch.cat([eye[:0], *products]),
    }


def rotations(arch: Architecture, w: Tensor) -> list[Tensor]:
    """Return what moves one unit of a normalised axis towards another, in one leaf at a time."""
    count, found = arch.num_parameters, []
    normed = {
        dim.axis
        for leaf in arch.leaves
        for dim in leaf.dims
        if "Norm" in type(arch.module.get_submodule(leaf.key.rpartition(".")[0])).__name__
    }
    for leaf in arch.leaves:
        places = torch.arange(leaf.size).reshape(leaf.shape) + leaf.offset
        for k, dim in enumerate(leaf.dims):
            if not leaf.learnable or dim.axis is None or dim.axis not in normed:
                continue
            rest = places.movedim(k, 0).reshape(leaf.shape[k], -1)
            n = len(rest)
            direction = torch.zeros(n, n, count, dtype=torch.float64)
            here = rest[:, None].expand(n, n, -1)
            direction.scatter_(2, here, w[rest][None].expand(n, n, -1))
            found.append(direction.flatten(0, 1))
    return found


def _is_table(arch: Architecture, key: str) -> bool:
    owner = arch.module.get_submodule(key.rpartition(".")[0])
    return isinstance(owner, torch.nn.Embedding)


def run() -> None:
    """Measure and store everything."""
    torch.set_num_threads(1)  # two of them wait for each other where the machine is shared
    rows: list[dict[str, Any]] = []
    names = sys.argv[1:]  # to look at some of them; nothing is stored then
    for entry in CATALOGUE:
        if names and not any(name in entry.name for name in names):
            continue
        rows.append(measure(entry))
        row = rows[-1]
        print(
            f"{entry.name}: {row['found']}, dimension {row['continuous_dimension']} of "
            f"{row['jacobian_nullity']} {row['excess_by_kind']}, changed by "
            f"{row['relative_change']['median']:.1e}",
            flush=True,
        )
    if names:
        return
    right = [row["found"] == row["expected"] for row in rows]
    what = f"{len(rows)} architectures whose groups are those worked out by hand"
    rows.append(record.judged(what, "share", [sum(right) / len(right)], at_least=1))
    exact = [row for row in rows[:-1] if row["rounding"] == "float64"]
    worst = max(row["relative_change"]["median"] for row in exact)
    what = f"largest change of an output of {len(exact)} architectures under {DRAWS} elements"
    rows.append(record.judged(what, "relative_change", [worst], at_most=1e-9))
    print(record.record("architectures", rows, SEED))


if __name__ == "__main__":
    run()
