"""Align one large pair and print seconds and memory as JSON; a process of its own, as memory stays.

Run by align.py. The pair is made in another process, so that this one never held a whole network.
"""

import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import torch

import symflow
from symflow.align import align_files

sys.path.append(str(record.ROOT / "tests"))
pretrained = importlib.import_module("catalogue_attention").pretrained

BERT = {
    "vocab_size": 23,
    "hidden_size": 36,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
RESNET = {"embedding_size": 6, "hidden_sizes": [8, 12, 16, 20]}
MODELS = {"BERT-base": ("BertModel", BERT), "ResNet-50": ("ResNetModel", RESNET)}


def memory(which: str) -> float:
    """Return gigabytes of this process: ``VmRSS`` now, ``VmHWM`` at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(which)) * 1024 / 1e9


def write(model: str, folder: Path) -> None:
    """Write two independent networks, as their package initialises them."""
    for k in (0, 1):
        torch.manual_seed(k)
        net = pretrained(model)()
        symflow.files.save_tensors(folder / f"{k}.safetensors", net.state_dict())


def architecture(model: str, small: dict[str, Any]) -> symflow.Architecture:
    """Trace the model on the meta device, believed by a small one of the same depth."""
    tokens = model == "BertModel"
    example = torch.randint(23, (2, 5)) if tokens else torch.zeros(2, 3, 64, 64)
    twin = symflow.Architecture.from_module(pretrained(model, **small)(), example)
    with torch.device("meta"):
        net = pretrained(model)()
    return symflow.Architecture.from_module(net, example.to("meta"), twin=twin)


def measured(name: str, folder: Path) -> dict[str, float]:
    """Trace and align; memory is counted from after the imports, or from the weights in memory."""
    model, small = MODELS[name.partition(" ")[0]]
    first, second = folder / "0.safetensors", folder / "1.safetensors"
    for module in ("scipy.optimize", "torch.export", "torch._dynamo"):
        importlib.import_module(module)
    pretrained("BertModel", num_hidden_layers=1, **BERT)()  # what importing it takes
    base, began = memory("VmRSS"), time.perf_counter()
    arch = architecture(model, small)
    traced = time.perf_counter() - began
    if name.endswith("memory"):
        symmetry = arch.symmetry.compact
        w = [arch.flatten(symflow.files.load_tensors(x)[0]) for x in (first, second)]
        base, began = memory("VmRSS"), time.perf_counter()
        found = symflow.WeightMatching()(symmetry, *w)
        seconds, before = time.perf_counter() - began, torch.dot(*w)
    else:
        began = time.perf_counter()
        found = align_files(arch, first, second, folder / "aligned.safetensors")
        seconds, before = time.perf_counter() - began, found.before
    gigabytes = memory("VmHWM") - base
    return {
        "parameters": arch.num_parameters,
        "seconds": round(seconds, 2),
        "trace_seconds": round(traced, 2),
        "gigabytes": round(gigabytes, 3),
        "times_the_weights": round(gigabytes / (arch.dimension * 4 / 1e9), 2),
        "objective": round(float(found.objective), 3),
        "objective_before": round(float(before), 3),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 3:
        write(sys.argv[1], Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as place:
            model = MODELS[sys.argv[1].partition(" ")[0]][0]
            subprocess.run([sys.executable, __file__, model, place], check=True)
            print(json.dumps(measured(sys.argv[1], Path(place))))
