"""Networks in files, and the architecture that their leaves belong to."""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from symflow.arch import Architecture, mlp
from symflow.errors import LeafError, SymflowError, UnsupportedModuleError
from symflow.files import load_tensors, save_tensors

# What is said of an activation that nobody has named.
ASSUMED = " (the activation is assumed: --activation changes it)"


@final
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A state dict in a safetensors file.

    Attributes
    ----------
    path
        The file.
    tensors
        What is in it.
    """

    path: Path
    tensors: dict[str, Tensor]

    @staticmethod
    def read(path: Path) -> "Checkpoint":
        """Read a file.

        Raises
        ------
        FileNotFoundError
            If there is none.
        FileFormatError
            If it is truncated or no safetensors file.
        """
        return Checkpoint(path, load_tensors(path)[0])

    def weights(self, arch: Architecture) -> Float[Tensor, " D"]:
        """Return the weights in float64.

        Raises
        ------
        LeafError
            If they are not those of the architecture, or not finite; it names file and leaf.
        """
        state = {k: v.double() if v.is_floating_point() else v for k, v in self.tensors.items()}
        return arch.as_weights(state, name=str(self.path))

    def replaced(self, arch: Architecture, w: Float[Tensor, " D"]) -> "Checkpoint":
        """Return other weights under the keys and in the dtypes of this file, with its counters.

        Raises
        ------
        LeafError
            If the dtype of a tensor cannot represent its new values.
        """
        state = arch.state_dict(w)
        tensors: dict[str, Tensor] = {}
        for key, old in self.tensors.items():
            tensors[key] = state[key].to(old.dtype) if old.is_floating_point() else old
            if not bool(tensors[key].isfinite().all()):
                most = float(state[key].abs().max())
                raise LeafError(
                    f"{self.path}: leaf {key!r} is {old.dtype}, which cannot represent its new "
                    f"values (up to {most:.3g}): nothing is written. Convert the file to a dtype "
                    "of more range, such as float32, or choose another --section"
                )
        return Checkpoint(self.path, tensors)

    def write(self, path: Path) -> None:
        """Write the file."""
        save_tensors(path, self.tensors)


def find_architecture(
    args: argparse.Namespace, tensors: Mapping[str, Tensor]
) -> tuple[Architecture | None, str]:
    """Return the architecture that was asked for or is recognised, and where it comes from.

    Parameters
    ----------
    args
        With the options ``module``, ``input``, ``mlp`` and ``activation``.
    tensors
        A state dict.

    Returns
    -------
    tuple
        The architecture and its description; or None and what is to be done about it. The
        description ends with ``ASSUMED`` where files do not tell the activation.

    Raises
    ------
    SymflowError
        If a module is none or cannot be traced.
    ArgumentError
        If options do not go together.
    """
    if args.module is not None:
        if args.activation is not None:
            raise argparse.ArgumentError(None, "--activation is for an MLP, not for --module")
        arch = _made_by(args.module, args.input)
        return arch, f"{type(arch.module).__name__}, traced"
    if args.input is not None:
        raise argparse.ArgumentError(None, "--input is for a module: give --module with it")
    widths = args.mlp or _chain_widths(tensors)
    # Leaves tell whether there are biases and normalisations; activations have none.
    options = {"bias": "0.bias" in tensors, "batch_norm": "1.running_mean" in tensors}
    arch = mlp(widths, args.activation or "relu", **options) if widths else None
    if arch is None or not (args.mlp or _shapes(arch.module.state_dict()) == _shapes(tensors)):
        return None, (
            "the leaves are not 0.weight, 0.bias, 2.weight, ... of an nn.Sequential MLP: tell the "
            "architecture by --module package:factory"
        )
    told = f"MLP {'-'.join(map(str, widths))}, {args.activation or 'relu'}"
    if args.mlp is None:
        told += ", recognised by its leaves"
    if args.activation is None:
        told += ASSUMED
    return arch, told


def _made_by(factory: Callable[[], Any], shape: list[int] | None) -> Architecture:
    name = getattr(factory, "__name__", type(factory).__name__)
    try:
        made = factory()
    except SymflowError:
        raise
    except Exception as error:  # it is a user's code: anything may come
        raise UnsupportedModuleError(
            f"what --module names is called without arguments; {name}() failed with "
            f"{_described(error)}. Name a callable of your own that returns a module, (module, "
            "example input) or an Architecture"
        ) from error
    if isinstance(made, Architecture):
        return made
    module, *inputs = made if isinstance(made, tuple) and made else (made,)
    if not isinstance(module, nn.Module):
        raise UnsupportedModuleError(
            "what --module names must return a module, (module, example input) or an Architecture; "
            f"it returns {type(made).__name__}"
        )
    inputs = inputs if shape is None else [torch.zeros(shape)]
    if not inputs:
        raise UnsupportedModuleError(
            "a module is traced with an example input: return (module, input), or give the shape "
            "of one, such as --input 1,784"
        )
    return Architecture.from_module(module, *inputs)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _chain_widths(tensors: Mapping[str, Tensor]) -> list[int]:
    """Widths of an MLP with the matrices 0.weight, 2.weight, ...; empty if there can be none."""
    found = [(re.fullmatch(r"(\d+)\.weight", key), x.shape) for key, x in tensors.items()]
    shapes = {int(key[1]): shape for key, shape in found if key and len(shape) == 2}
    matrices = [shapes[k] for k in sorted(shapes)]
    widths = [n for m in matrices[:1] for n in reversed(m)] + [m[0] for m in matrices[1:]]
    return widths if all(widths) else []
