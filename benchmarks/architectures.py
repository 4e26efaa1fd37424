"""What is found in the architectures that people have. Writes architectures.json.

Each row: the groups found and those expected (worked out by hand in tests/catalogue.py), and how
well the function is kept. Beside it, not judged: the dimension of the continuous symmetry that was
found, and the nullity of the Jacobian of the outputs by the parameters, which counts all of it.
"""

import sys
import time
from typing import Any

import record
import torch
from torch import Tensor
from torch.func import jacrev

from symflow.arch import Architecture
from symflow.groups import NoncompactGroup

sys.path.insert(0, str(record.ROOT / "tests"))
from catalogue import CATALOGUE, Entry, told

SEED = 0
DRAWS = 5
# Singular values below this share of the largest count as zero.
NULL = 1e-12
JACOBIAN = 2000  # parameters up to which the nullity is computed


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
    continuous = sum(a.size for a in arch.axes if isinstance(a.group, NoncompactGroup))
    total = nullity(arch, w, entry, generator) if count <= JACOBIAN else None
    relative = change / float(before.abs().max())
    row = record.judged(entry.name, "relative_change", [relative], at_most=1e-9)
    return row | {
        "parameters": count,
        "found": found,
        "expected": list(entry.axes),
        "continuous_dimension": continuous,
        "jacobian_nullity": total,
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


def nullity(arch: Architecture, w: Tensor, entry: Entry, generator: torch.Generator) -> int:
    """Return in how many directions the parameters move without moving any output."""
    count = arch.num_parameters
    rows = torch.zeros(0, count, dtype=torch.float64)
    while len(rows) < 2 * count:
        inputs = draw(entry, generator)
        one = jacrev(lambda v, x=inputs: arch.apply(torch.cat([v, w[count:]]), *x))(w[:count])
        rows = torch.cat([rows, one.reshape(-1, count)])
    values = torch.linalg.svdvals(rows)
    return int((values <= NULL * values.max()).sum())


def run() -> None:
    """Measure and store everything."""
    torch.set_num_threads(2)
    rows: list[dict[str, Any]] = []
    for entry in CATALOGUE:
        rows.append(measure(entry))
        row = rows[-1]
        print(
            f"{entry.name}: {row['found']}, dimension {row['continuous_dimension']} of "
            f"{row['jacobian_nullity']}, changed by {row['relative_change']['median']:.1e}",
            flush=True,
        )
    right = [row["found"] == row["expected"] for row in rows]
    what = f"{len(rows)} architectures whose groups are those worked out by hand"
    rows.append(record.judged(what, "share", [sum(right) / len(right)], at_least=1))
    worst = max(row["relative_change"]["median"] for row in rows[:-1])
    what = f"largest change of an output of {len(rows) - 1} architectures under {DRAWS} elements"
    rows.append(record.judged(what, "relative_change", [worst], at_most=1e-9))
    print(record.record("architectures", rows, SEED))


if __name__ == "__main__":
    run()
