"""How modules are run: what they return, and how they are mapped over many weights."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Find the floating point tensors of what a module returns, the one to look at first.

    That is the first one, or the one called ``logits``.
    """
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        ordered = ["logits"] if "logits" in output else []
        for key in [*ordered, *(key for key in output if key != "logits")]:
            yield from tensors_of(output[key])
    elif isinstance(output, tuple | list):
        for part in output:
            yield from tensors_of(part)


def has_recurrence(module: nn.Module) -> bool:
    """Whether networks must run one after the other: PyTorch cannot map recurrent kernels."""
    return any(isinstance(part, nn.RNNBase) for part in module.modules())


@contextmanager
def mappable() -> Generator[None]:
    """Run attention by operations that can be mapped over networks: its fused kernels cannot."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
