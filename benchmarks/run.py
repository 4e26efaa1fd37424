"""Run the benchmarks, each in a process of its own, and print what was wanted and measured."""

import argparse
import subprocess
import sys
from pathlib import Path

import record

BENCHMARKS = (
    "geometry",
    "zoo",
    "nn",
    "flows",
    "demo",
    "architectures",
    "align",
    "recovery",
    "barriers",
    "average",
)


def main() -> int:
    """Return 1 if a benchmark failed or missed what was wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="may be repeated")
    names = parser.parse_args().only or BENCHMARKS
    failed = []
    for name in names:
        script = Path(__file__).with_name(f"{name}.py")
        if subprocess.run([sys.executable, str(script)]).returncode:
            failed.append(name)
    reports = [record.load(name) for name in names if name not in failed]
    print("\n" + "\n".join(map(record.table, reports)))
    for name in failed:
        print(f"FAILED {name}")
    return int(bool(failed) or not all(row["met"] for r in reports for row in r["rows"]))


if __name__ == "__main__":
    sys.exit(main())
