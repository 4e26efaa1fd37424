"""The study as one self-contained HTML page."""

import base64
import html
from typing import Any

from symflow.report.measure import mean, median, standard_error
from symflow.report.study import HELD_OUT, NETWORKS, PATHS, TRAINING

_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #5b6470; --line: #dde2e8; --tint: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; margin: 0 0 .25rem; letter-spacing: -.02em; }
h2 { margin: 2.75rem 0 .5rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
p, li { max-width: 46rem; } .soft { color: var(--soft); }
figure { margin: 1.25rem 0; } img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; margin-top: .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; margin: 1rem 0; }
th, td { padding: .4rem .5rem; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { background: var(--tint); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; }
tr.trained td { font-weight: 600; } tr.baseline td { color: var(--soft); }
.met { color: #00703c; font-weight: 600; } .missed { color: #b00020; font-weight: 600; }
pre { background: var(--tint); padding: 1rem; overflow-x: auto; font-size: .82rem; }
"""

_CAPTIONS = {
    "barriers": "Loss along paths between two trained networks: on the straight line as they came "
    "out of training, with the neurons of the second matched to those of the first, and along "
    "geodesics of the quotient.",
    "samples": "Every set of networks: trained ones, flows, baselines.",
    "novelty": "Distance to the nearest network that the flows were trained on: copies would be at "
    "the left, good networks at the bottom. The noise of the baseline has the size that parts "
    "independent networks.",
    "plane": "All networks, aligned to one training network, in the plane in which the training "
    "networks differ most. Grey: training; black: held out.",
    "steps": "How many Euler steps a sample needs.",
    "training": "Loss of each flow while it was trained.",
}


def page(results: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """Return the page; nothing in it is loaded from elsewhere.

    Parameters
    ----------
    results
        What :func:`symflow.report.study` returned.
    pictures
        What :func:`symflow.report.figures.draw` made of it.
    """
    settings, about = results["settings"], results["architecture"]
    seconds = sum(results["seconds"].values())
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>symflow: {about['name']}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>New networks from {settings['runs']} trained ones</h1>",
        f"<p class='soft'>{html.escape(about['task'])}. {about['name']} with ReLU, "
        f"{about['parameters']} parameters, from N(0, {settings['std']}²), Adam "
        f"{settings['lr']}, batch {settings['batch_size']}, {settings['epochs']} epochs. "
        f"Seed {settings['seed']}; {seconds:.0f} s in all; "
        f"symflow {results['provenance']['symflow']}, torch {results['provenance']['torch']}.</p>",
        checks_table(results["checks"]),
        "<h2>What leaves the function unchanged</h2>",
        f"<pre>{html.escape(about['symmetry'])}</pre>",
        "<h2>The landscape, before and after dividing it out</h2>",
        _figure("barriers", pictures),
        _barrier_table(results["barriers"]),
        "<h2>New networks</h2>",
        "<p>Four flows, each an equivariant transformer over the units of the network, trained to "
        "predict the end of a training run from its beginning (run coupling), with path noise. "
        f"{settings['samples']} fresh Gaussian initialisations were pushed through "
        f"{settings['sampling_steps']} Euler steps. No labels and no held-out network were used; "
        "the number of steps was fixed beforehand.</p>",
        networks_table(results["networks"]),
        *(_figure(name, pictures) for name in ("samples", "novelty", "plane", "steps", "training")),
        "<h2>How to read it</h2>",
        f"<ul><li>{_note(settings)}</li>",
        "<li>Losses are in nats. Normalized and Geometric divide all logits by one number; its "
        "logarithm is kept as one more coordinate of the flow, so the losses are those of the "
        "networks as they would be used: no temperature was refitted.</li>",
        "<li>Barriers of the test loss can be negative: the middle of two overconfident networks "
        "is less sure of itself.</li>",
        "<li>Distances are those of the quotient (balanced section, neurons matched), so that "
        "neurons in another order hide no copy. They are upper bounds, as the matching is a "
        "heuristic.</li></ul>",
        "</main></body></html>",
    ]
    return "\n".join(parts)


def _note(settings: dict[str, Any]) -> str:
    return (
        f"“{HELD_OUT}” are {settings['held_out']} networks trained like the {settings['runs']} "
        f"that the flows saw, from other seeds: what a perfect generator would draw. "
        f"“{TRAINING}” are those {settings['runs']} themselves; their nearest network is another "
        "one of them."
    )


def _figure(name: str, pictures: dict[str, bytes]) -> str:
    data = base64.b64encode(pictures[name]).decode()
    return (
        f"<figure><img alt='{name}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{_CAPTIONS[name]}</figcaption></figure>"
    )


def checks_table(checks: list[dict[str, Any]]) -> str:
    """Return what the study had to show, and whether it did, as an HTML table."""
    rows = [
        f"<tr><td class='text'>{html.escape(c['what'])}</td><td>{c['got']:.3g}</td>"
        f"<td>{c['side']} {c['limit']:.3g}</td>"
        f"<td class='{'met' if c['met'] else 'missed'}'>{'met' if c['met'] else 'missed'}</td></tr>"
        for c in checks
    ]
    return _table(["wanted", "figure", "limit", ""], rows)


def networks_table(networks: dict[str, Any]) -> str:
    """Return the comparison of all sets of networks as an HTML table."""
    reference = median(networks[HELD_OUT]["nearest"])
    rows: list[str] = []
    for name in NETWORKS:
        found = networks[name]
        far = median(found["nearest"])
        cells = [
            _with_error(found["accuracy"], 4),
            _with_error(found["loss"], 3),
            f"{mean(found['train loss']):.4f}",
            f"{found['averaged accuracy']:.4f}",
            f"{found['averaged loss']:.3f}",
            f"{found['diversity']:.4f}",
            f"{far:.3f}",
            f"{far / reference:.2f}",
            f"{found['training seconds']:.0f} s" if "training seconds" in found else "",
        ]
        inside = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr class='{found['kind']}'><td>{name}</td>{inside}</tr>")
    heads = [
        *(
            "networks",
            "test accuracy",
            "test loss",
            "training<br>loss",
            "all averaged:<br>accuracy",
        ),
        *("<br>loss", "diversity<br>(JS, nats)", "nearest<br>(median)", "against<br>held out"),
        "training",
    ]
    return _table(heads, rows)


def _barrier_table(barriers: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{name}</td><td>{_with_error(barriers[name]['train midpoint'], 4)}</td>"
        f"<td>{_with_error(barriers[name]['test midpoint'], 4)}</td></tr>"
        for name in PATHS
    ]
    heads = ["path", "midpoint barrier, training loss", "midpoint barrier, test loss"]
    return _table(heads, rows)


def _with_error(values: list[float], digits: int) -> str:
    """Mean and standard error."""
    return f"{mean(values):.{digits}f} ± {standard_error(values):.{digits}f}"


def _table(heads: list[str], rows: list[str]) -> str:
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f"<div class='wide'><table><tr>{head}</tr>{''.join(rows)}</table></div>"
