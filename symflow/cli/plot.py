"""The picture of a path between networks."""

import io
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from symflow.errors import FileFormatError
from symflow.files import write_atomic


def require_picture(file: Path) -> None:
    """Refuse a file before the work is done that it is to show.

    Raises
    ------
    FileFormatError
        If matplotlib does not know its suffix.

    Examples
    --------
    >>> require_picture(Path("paths.png"))
    """
    known = sorted(Figure().canvas.get_supported_filetypes())
    if file.suffix.removeprefix(".").lower() not in known:
        raise FileFormatError(f"{file}: pictures are {', '.join(known)}; name it so")


def draw_paths(
    file: Path, times: Float[Tensor, " points"], losses: Mapping[str, Float[Tensor, " points"]]
) -> None:
    """Draw the loss along paths, one line for each, in the format that the file's suffix names.

    Examples
    --------
    >>> import tempfile, torch
    >>> file = Path(tempfile.mkdtemp()) / "paths.svg"
    >>> draw_paths(file, torch.linspace(0, 1, 3), {"raw": torch.tensor([1.0, 5.0, 1.0])})
    >>> file.exists()
    True
    """
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, values in losses.items():
        axes.plot(times.tolist(), values.tolist(), marker=".", label=name)
    axes.set(xlabel="t, from A to B", ylabel="loss", ylim=(0, None))
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file.suffix.removeprefix(".").lower())
    write_atomic(file, buffer.getvalue())
