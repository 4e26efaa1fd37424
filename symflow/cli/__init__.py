"""The command ``symflow``: inspect, align, compare and merge networks in safetensors files.

Numbers are computed in float64; files that are written have the keys and dtypes of their source.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from symflow.cli.arguments import parser
from symflow.errors import SymflowError, SymflowWarning

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Parameters
    ----------
    argv
        Arguments after the command's name; by default those of the process.

    Returns
    -------
    int
        0; 2 if something was refused, with one line on standard error that says what; 130 after an
        interruption from the keyboard.

    Raises
    ------
    SystemExit
        From ``--help`` and ``--version``, and with 2 for arguments that cannot be parsed.

    Examples
    --------
    >>> import symflow, tempfile, torch
    >>> file, arch = f"{tempfile.mkdtemp()}/net.safetensors", symflow.mlp([3, 4, 2])
    >>> w = torch.randn(2, arch.dimension, generator=torch.Generator().manual_seed(0))
    >>> symflow.files.save_tensors(file, arch.state_dict(w[0]))
    >>> main(["interpolate", file, file, "-o", f"{file}.middle", "--activation", "relu"])
    wrote ...net.safetensors.middle
    length 0
    0
    """
    args = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", SymflowWarning)
            warnings.showwarning = _show_warning
            args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who reads, such as head, has seen enough. Python would flush once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (SymflowError, OSError, argparse.ArgumentError) as error:
        sys.stderr.write(f"symflow: error: {_one_line(error)}\n")
        return 2
    return 0


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error).partition("\n")[0]


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"symflow: warning: {message}\n")
