"""One step of training: gradients, optimisers, and the running average that samples come from."""

from typing import final

import torch
from torch import Tensor

from symflow.errors import StateError
from symflow.flows.settings import FitSettings
from symflow.nn import VectorField


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
    """

    def __init__(
        self, field: VectorField, average: VectorField, settings: FitSettings, name: str
    ) -> None:
        self.field = field
        self.average = average
        self.settings = settings
        self.name = name
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
        size = torch.nn.utils.clip_grad_norm_(self.field.parameters(), self.settings.clip)
        if not bool(size.isfinite()):
            raise StateError(f"{self.name} diverged at step {k}: lower lr (now {self.settings.lr})")
        for optimizer in self.optimizers:
            optimizer.step()
        # Early averages would be dominated by the untrained network.
        decay = min(self.settings.ema, (2 + k) / (11 + k))
        with torch.no_grad():
            averages, values = list(self.average.parameters()), list(self.field.parameters())
            for average, value in zip(averages, values, strict=True):
                average.lerp_(value, 1 - decay)
        return float(loss.detach())

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
