"""Source distributions: how the weights of untrained networks are drawn."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from symflow.arch import Architecture, Leaf
from symflow.errors import ShapeError


class Source(ABC):
    """A distribution over initial weights.

    Leaves of linear maps (modules whose weight has two or more dimensions) are drawn; all others,
    such as gains and statistics of normalisation layers, start where their module resets them.
    """

    @abstractmethod
    def spread(self, leaf: Leaf, fan_in: int) -> float:
        """Return the standard deviation of a leaf's entries."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw float64 entries of mean zero and variance one."""

    def sample(
        self,
        arch: Architecture,
        n: int,
        *,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "n D"]:
        """Draw the weights of ``n`` untrained networks on the generator's device.

        Examples
        --------
        >>> import symflow
        >>> generator = torch.Generator().manual_seed(0)
        >>> Gaussian(0.1).sample(symflow.mlp([3, 4, 2]), 5, generator=generator).shape
        torch.Size([5, 26])
        """
        if n < 1:
            raise ShapeError(f"n must be at least 1, got {n}")
        starts, fans = _starting_values(arch)
        pieces: list[Tensor] = []
        for leaf in arch.leaves:
            if leaf.key in fans:
                noise = self.draw((n, leaf.size), generator)
                pieces.append(noise * self.spread(leaf, fans[leaf.key]))
            else:
                start = leaf.of(starts[leaf.key]).to(generator.device, torch.float64)
                pieces.append(start.reshape(-1).expand(n, leaf.size))
        return torch.cat(pieces, dim=-1).to(dtype)


@final
@dataclass(frozen=True)
class Gaussian(Source):
    """Independent N(0, std^2) for every weight and bias: the source thesis' initialisation.

    Examples
    --------
    >>> Gaussian(0.1)
    Gaussian(std=0.1)
    """

    std: float = 0.1

    def spread(self, leaf: Leaf, fan_in: int) -> float:
        """Return ``std``."""
        return self.std

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)


@final
@dataclass(frozen=True)
class FanIn(Source):
    """PyTorch's default of linear maps: uniform within 1 / sqrt(fan in), weights and biases.

    Examples
    --------
    >>> round(FanIn().spread(Leaf("w", (2, 3), (), 0), 3), 3)
    0.333
    """

    def spread(self, leaf: Leaf, fan_in: int) -> float:
        """Return the standard deviation of U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
        return (3 * fan_in) ** -0.5

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw uniform numbers of variance one."""
        uniform = torch.rand(
            shape, generator=generator, dtype=torch.float64, device=generator.device
        )
        return (2 * uniform - 1) * 3**0.5


def _starting_values(arch: Architecture) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Reset values of every leaf, and the fan-in of those that a source draws."""
    fresh = copy.deepcopy(arch.module)
    fans: dict[str, int] = {}
    for path, module in fresh.named_modules():
        own = {
            f"{path}.{key}" if path else key: value
            for key, value in module.named_parameters(recurse=False)
        }
        maps = [value for value in own.values() if value.ndim > 1]
        if maps:
            fan_in = max(1, maps[0].numel() // maps[0].shape[0])
            fans |= dict.fromkeys(own, fan_in)
        else:
            reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    return fresh.state_dict(), fans
