"""Whether alignment finds a planted element of the group under noise. Writes recovery.json.

The second network is g . (w0 + noise), with g drawn from the whole group (scales and invertible
matrices too) and Gaussian noise of 1 % of the root mean square of each leaf. It is recovered if the
permutations and signs found undo those of g exactly, what is left is within 2 %, and running
variances are positive. Of this the noise itself is about 1 %: the distance of the two projected
networks before g is stored beside it, and that after g, not aligned.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import record
import torch
from torch import Tensor, nn

import symflow
from symflow.arch import Architecture, Element, Symmetry
from symflow.groups import Permutation, Sign, monomial

sys.path.insert(0, str(record.ROOT / "tests"))
from catalogue import resnet20
from catalogue_attention import Attention, pretrained

SEED = 0
SEEDS = 10
NOISE, WITHIN = 0.01, 0.02
# Parameters that an initialisation makes constant, and running statistics, are spread by so much.
SPREAD = 0.2
THREADS = 1


class Block(nn.Module):
    """LayerNorm and attention, LayerNorm and MLP, both residual."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Any) -> Any:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Dosovitskiy et al. (2021): square patches, a class token, positions, pre-norm blocks."""

    def __init__(
        self,
        channels: int,
        size: int,
        patch: int,
        *,
        width: int = 32,
        heads: int = 4,
        blocks: int = 2,
        hidden: int = 64,
        classes: int = 10,
    ):
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) / 10)
        self.positions = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) / 10)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Recurrent(nn.Module):
    """The last output of an LSTM, read by a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(16, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Any) -> Any:
        outputs, _ = self.layer(x)
        return self.head(outputs[:, -1])


class Siren(nn.Module):
    """Sitzmann et al. (2020): sines of linear maps, initialised as there."""

    def __init__(self, width: int = 128, layers: int = 3):
        super().__init__()
        ins = (2, *(width,) * (layers - 1))
        self.layers = nn.ModuleList(nn.Linear(n, width) for n in ins)
        self.last = nn.Linear(width, 3)
        for k, n in enumerate((*ins, width)):
            bound = 1 / 2 if k == 0 else (6 / n) ** 0.5 / 30
            layer = self.last if k == layers else self.layers[k]
            nn.init.uniform_(layer.get_parameter("weight"), -bound, bound)

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.last(x)


def vgg() -> nn.Module:
    """Simonyan and Zisserman (2015), small: pairs of convolutions, pooling, two linear maps."""
    layers: list[nn.Module] = []
    n_in = 3
    for n_out in (16, 32):
        for _ in range(2):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU()]
            n_in = n_out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10)
    )


@dataclass(frozen=True)
class Subject:
    """One architecture.

    Attributes
    ----------
    name
        What it is.
    make
        Builds a new network.
    inputs
        Example inputs.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]


_IMAGES, _TOKENS = torch.zeros(2, 3, 16, 16), torch.arange(16).reshape(2, 8)
SUBJECTS = (
    Subject("VGG-style CNN", vgg, (_IMAGES,)),
    Subject("ResNet-20, width 16", lambda: resnet20(16), (_IMAGES,)),
    Subject("vision transformer", lambda: VisionTransformer(3, 16, 4), (_IMAGES,)),
    Subject(
        "GPT-2 (transformers)",
        pretrained(
            "GPT2LMHeadModel",
            vocab_size=128,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        ),
        (_TOKENS,),
    ),
    Subject("LSTM", Recurrent, (torch.zeros(2, 8, 16),)),
    Subject("SIREN", Siren, (torch.zeros(4, 2),)),
    Subject(
        "Llama (transformers)",
        pretrained(
            "LlamaForCausalLM",
            vocab_size=128,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        ),
        (_TOKENS,),
    ),
)


def draw(arch: Architecture, make: Callable[[], nn.Module], seed: int) -> Tensor:
    """Initialise a network; what would be constant is drawn around its value."""
    torch.manual_seed(seed)
    w = arch.flatten(make().double())
    generator = torch.Generator().manual_seed(seed)
    for leaf in arch.leaves:
        x = w[leaf.span]
        noise = SPREAD * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if "running_var" in leaf.key:
            w[leaf.span] = x * noise.exp()
        elif not leaf.learnable or bool((x == x[0]).all()):
            w[leaf.span] = x + noise
    return w


def disturbed(arch: Architecture, w: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise, a share of the root mean square of each leaf."""
    noise = torch.randn(w.shape, generator=generator, dtype=w.dtype)
    for leaf in arch.leaves:
        noise[leaf.span] *= NOISE * w[leaf.span].square().mean().sqrt()
    return w + noise


def discrete(symmetry: Symmetry, whole: Symmetry, g: Element) -> tuple[Symmetry, Element]:
    """Keep the permutations and signs of an element, on all axes of the whole group."""
    axes, parts = [], {}
    for axis in whole.axes:
        found = monomial(symmetry[axis.name].group, g[axis.name]) if axis.name in g else None
        index, scales = (None, None) if found is None else found
        permutation, sign = Permutation(axis.size), Sign(axis.size)
        units = () if axis.over is None else (whole[axis.over].size,)
        if index is None:
            index = torch.arange(axis.size).expand(*units, axis.size)
        if scales is None:
            scales = torch.ones(*units, axis.size, dtype=torch.float64)
        axes.append(replace(axis, group=permutation @ sign))
        # (a, b) is the matrix a b: signs first.
        signs = torch.empty_like(scales).scatter_(-1, index, scales.sign())
        parts[axis.name] = (index, signs)
    return replace(whole, axes=tuple(axes)), parts


def unlike(whole: Symmetry, around: Element) -> list[str]:
    """Name the axes on which an element of permutations and signs is not the identity."""
    names = []
    for axis in whole.axes:
        index, signs = around[axis.name]
        if not bool((index == torch.arange(axis.size)).all() and (signs == 1).all()):
            names.append(axis.name)
    return names


def plant(quotient: symflow.Quotient, w0: Tensor, seed: int) -> dict[str, Any]:
    """Plant an element, align, and compare."""
    arch, counted = quotient.arch, quotient.arch.num_parameters
    generator = torch.Generator().manual_seed(1000 + seed)
    g = arch.symmetry.random(generator=generator, like=w0)
    near = disturbed(arch, w0, generator)
    w1 = arch.symmetry.act(g, near)
    start = time.perf_counter()
    found = quotient.align(w0, w1)
    seconds = time.perf_counter() - start
    x0, x1 = quotient.project(w0), quotient.project(near)
    group, planted = discrete(arch.symmetry, arch.symmetry, g)
    _, undone = discrete(quotient.symmetry, arch.symmetry, found.element)

    def apart(a: Tensor) -> float:
        return float((a - x0)[:counted].norm() / x0[:counted].norm())

    variances = [found.weights[leaf.span] for leaf in arch.leaves if "running_var" in leaf.key]
    return {
        "seed": seed,
        "wrong_axes": unlike(arch.symmetry, group.compose(undone, planted)),
        "relative_error": apart(found.weights),
        "noise": apart(x1),
        "unaligned": apart(quotient.project(w1)),
        "least_variance": min((float(v.min()) for v in variances), default=None),
        "seconds": seconds,
    }


def recovered(trial: dict[str, Any]) -> bool:
    """Whether a trial ended where it should."""
    variance = trial["least_variance"]
    close = trial["relative_error"] <= WITHIN
    return not trial["wrong_axes"] and close and (variance is None or variance > 0)


def measure(subject: Subject) -> dict[str, Any]:
    """Plant and align from several seeds."""
    arch = Architecture.from_module(subject.make(), *subject.inputs)
    quotient = symflow.Quotient(arch)
    trials = []
    for seed in range(SEED, SEED + SEEDS):
        trials.append(plant(quotient, draw(arch, subject.make, seed), seed))
    row = record.judged(
        f"{subject.name}: planted elements recovered under {NOISE:.0%} noise, {SEEDS} seeds",
        "share",
        [sum(map(recovered, trials)) / SEEDS],
        at_least=1,
    )
    figures = ("relative_error", "noise", "unaligned", "seconds")
    return row | {
        "parameters": arch.num_parameters,
        "groups": [f"{axis.name}: {axis.group}" for axis in arch.axes],
        **{name: record.spread([trial[name] for trial in trials]) for name in figures},
        "failed": [trial for trial in trials if not recovered(trial)],
        "in_readme": False,
    }


def run() -> None:
    """Measure and store everything."""
    torch.set_num_threads(THREADS)
    rows = []
    for subject in SUBJECTS:
        row = measure(subject)
        rows.append(row)
        print(
            f"{subject.name}: {row['parameters']} parameters, share {row['share']['median']}, "
            f"error {row['relative_error']['max']:.4f} of noise {row['noise']['max']:.4f}, "
            f"{row['seconds']['median']:.3f} s, failed {row['failed']}",
            flush=True,
        )
    what = f"planted elements recovered under {NOISE:.0%} noise, {len(rows)} architectures"
    share = sum(row["share"]["median"] for row in rows) / len(rows)
    worst = max(row["relative_error"]["max"] for row in rows)
    rows.append(record.judged(what, "share", [share], at_least=1))
    what = f"largest error of a planted element, {len(rows) - 1} architectures x {SEEDS} seeds"
    rows.append(record.judged(what, "relative_error", [worst], at_most=WITHIN))
    print(record.record("recovery", rows, SEED))
    print(record.table({"rows": rows}))


if __name__ == "__main__":
    run()
