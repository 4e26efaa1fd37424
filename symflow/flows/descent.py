"""One step of training: gradients, optimisers, and the running average that samples come from."""

from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from symflow.errors import StateError
from symflow.flows.settings import FitSettings
from symflow.nn import VectorField


@runtime_checkable
class Processes(Protocol):
    """Processes that train one flow together: what is used of a ``lightning_fabric.Fabric``.

    Examples
    --------
    >>> from lightning_fabric import Fabric
    >>> fabric: Processes = Fabric(accelerator="cpu", devices=1)
    >>> fabric.world_size, fabric.global_rank
    (1, 0)
    """

    @property
    def world_size(self) -> int:
        """How many there are."""
        ...

    @property
    def global_rank(self) -> int:
        """Which one this is, from 0."""
        ...

    def all_reduce(self, data: Any, *, reduce_op: Any = "mean") -> Any:
        """Return the mean over all processes."""
        ...

    def barrier(self) -> None:
        """Wait for all."""
        ...


@final
class Descent:
    """The optimisers of a field and its running average.

    Parameters
    ----------
    field, average
        The field that is trained, and the copy that follows it.
    settings
        Optimiser, step sizes, clipping and decay.
    name
        What is trained, in errors.
    processes
        Others that train the same field, each on its share of every batch: gradients are averaged.
    """

    def __init__(
        self,
        field: VectorField,
        average: VectorField,
        settings: FitSettings,
        name: str,
        processes: Processes | None = None,
    ) -> None:
        self.field = field
        self.average = average
        self.settings = settings
        self.name = name
        self.processes = processes
        self.optimizers = settings.optimizers_over(list(field.parameters()))

    def step(self, loss: Tensor, k: int) -> float:
        """Descend a loss in step number ``k``, from 0; return its value.

        Raises
        ------
        StateError
            If the gradient is not finite; nothing is changed then.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.rate(k)
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        found = self._averaged(loss.detach())
        size = torch.nn.utils.clip_grad_norm_(self.field.parameters(), self.settings.clip)
        if not bool(size.isfinite()):
            raise StateError(f"{self.name} diverged at step {k}: lower lr (now {self.settings.lr})")
        for optimizer in self.optimizers:
            optimizer.step()
        # Early averages would be dominated by the untrained network.
        decay = min(self.settings.ema, (2 + k) / (11 + k))
        follow = get_ema_multi_avg_fn(decay)
        follow(list(self.average.parameters()), list(self.field.parameters()), k)
        return float(found)

    def _averaged(self, loss: Tensor) -> Tensor:
        """Average gradients and the loss over all processes, in one exchange."""
        if self.processes is None or self.processes.world_size == 1:
            return loss
        moving = [p for p in self.field.parameters() if p.requires_grad]
        for p in moving:  # all processes must exchange the same numbers
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [torch.as_tensor(p.grad) for p in moving]
        together = torch.cat([loss.reshape(1), *(g.flatten() for g in gradients)])
        together = torch.as_tensor(self.processes.all_reduce(together, reduce_op="mean"))
        for g, mean in zip(
            gradients, together[1:].split([g.numel() for g in gradients]), strict=True
        ):
            g.copy_(mean.view_as(g))
        return together[0]

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of the optimisers."""
        return {
            f"optimizer.{n}.{i}.{k}": v
            for n, optimizer in enumerate(self.optimizers)
            for i, state in optimizer.state_dict()["state"].items()
            for k, v in state.items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`tensors` returned, among others."""
        for n, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{n}."):
                    _, _, index, name = key.split(".", 3)
                    state.setdefault(int(index), {})[name] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
