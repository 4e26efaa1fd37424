"""Compare two stored results, row by row.

python benchmarks/compare.py old.json new.json
python benchmarks/compare.py HEAD~3 nn          # results/nn.json then, against now
"""

import argparse
import json
from pathlib import Path
from typing import Any

import record


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return a line for each median that both have, and for each row that only one has."""
    before = {row["what"]: row for row in old["rows"]}
    after = {row["what"]: row for row in new["rows"]}
    lines = [
        f"{'old':>10}{'new':>10}{'new/old':>9}  commits {old['commit'][:9]}, {new['commit'][:9]}"
    ]
    if old["machine"] != new["machine"]:
        lines.append("machines differ: times do not compare, ratios may")
    for what in dict.fromkeys([*before, *after]):
        if what not in before or what not in after:
            lines.append(f"only {'new' if what in after else 'old'}: {what}")
            continue
        for name, value in after[what].items():
            was = before[what].get(name)
            if isinstance(value, dict) and isinstance(was, dict) and "median" in value:
                a, b = was["median"], value["median"]
                ratio = f"{b / a:.3g}" if a else "-"
                lines.append(f"{a:>10.4g}{b:>10.4g}{ratio:>9}  {name}: {what}")
    return "\n".join(lines)


def main() -> None:
    """Print the comparison of two files, or of a commit's results with those of now."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="a result file, or a commit")
    parser.add_argument("new", help="a result file, or the name of a benchmark")
    options = parser.parse_args()
    if Path(options.old).is_file():
        old, new = (json.loads(Path(p).read_text()) for p in (options.old, options.new))
    else:
        old, new = record.load(options.new, options.old), record.load(options.new)
    print(compare(old, new))


if __name__ == "__main__":
    main()
