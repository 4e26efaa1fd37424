"""Draw how far each stored figure lies on the good side of its line: results/benchmarks.svg."""

import matplotlib as mpl
import record
from matplotlib import pyplot as plt
from run import BENCHMARKS


def main() -> None:
    """Draw one bar for each judged row; 1 is the line, to the right of it is good."""
    mpl.rcParams["svg.hashsalt"] = "symflow"  # the same results give the same file
    names, margins = [], []
    for name in BENCHMARKS:
        if not (record.RESULTS / f"{name}.json").exists():
            continue
        for row in record.load(name)["rows"]:
            median = row[row["figure"]]["median"]
            bound = row.get("at_least", row.get("at_most"))
            if min(median, bound) <= 0:  # no ratio, as of an import that cost nothing measurable
                continue
            margin = median / bound if "at_least" in row else bound / median
            names.append(f"{row['what']}\n{median:.3g} (wanted: {row['wanted']})")
            margins.append(margin)
    figure, ax = plt.subplots(figsize=(11, 0.55 * len(names) + 1), layout="constrained")
    ax.barh(
        names, [m - 1 for m in margins], left=1, color=["C0" if m >= 1 else "C3" for m in margins]
    )
    ax.axvline(1, color="black")
    ax.set(xscale="log", xlabel="times better than wanted")
    ax.tick_params(axis="y", labelsize=7)
    ax.invert_yaxis()
    figure.savefig(record.RESULTS / "benchmarks.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
