"""Networks as they run in training: BatchNorm goes by the inputs at hand."""

import copy
from dataclasses import replace
from typing import TypeAlias, final

from torch import Tensor, nn
from torch.nn import functional as F

from symflow.arch.architecture import Architecture

BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def by_batch(arch: Architecture) -> Architecture:
    """Return the architecture with every BatchNorm normalising by the inputs it is run on.

    The leaves are the same; running statistics are not looked at. All else stays in evaluation
    mode, without dropout. An architecture without BatchNorm is returned as it is.

    Parameters
    ----------
    arch
        The architecture.

    Returns
    -------
    Architecture
        One to :meth:`~symflow.Architecture.apply`: on a batch of several inputs.

    Examples
    --------
    >>> import symflow, torch
    >>> arch = symflow.mlp([1, 1, 1], batch_norm=True)
    >>> w = torch.tensor([2.0, 0.0, 1.0, 0.0, 1.0, 0.0, 9.0, 9.0])    # x -> 2 x, then BatchNorm
    >>> by_batch(arch).apply(w, torch.tensor([[1.0], [3.0]])).round().flatten()
    tensor([0., 1.])
    """
    module = copy.deepcopy(arch.module)
    # One module may stand at several places.
    places = module.named_modules(remove_duplicate=False)
    found = [(path, part) for path, part in places if isinstance(part, BATCH_NORM)]
    if not found:
        return arch
    new = {part: _ByBatch(part) for _, part in found}
    if found[0][0] == "":
        return replace(arch, module=new[found[0][1]])
    for path, part in found:
        module.set_submodule(path, new[part])
    return replace(arch, module=module)


@final
class _ByBatch(nn.Module):
    """A BatchNorm's gain and shift behind the batch's own moments.

    The training mode of PyTorch's would write to running statistics.
    """

    def __init__(self, part: BatchNorm) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.eps = part.weight, part.bias, part.eps
        for name, value in part.named_buffers(recurse=False):  # leaves stay what they are
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
