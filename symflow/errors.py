"""Every error and warning that symflow raises.

An error says which argument was wrong, what was wanted, what came, and what to do. Shapes and norms
are quoted, whole arrays never.
"""


class SymflowError(Exception):
    """Base class of every error raised on purpose by symflow.

    Examples
    --------
    >>> issubclass(ShapeError, SymflowError) and issubclass(ShapeError, ValueError)
    True
    """


class ShapeError(SymflowError, ValueError):
    """A tensor has the wrong shape, or the wrong type for its role."""


class LeafError(SymflowError, ValueError):
    """A leaf of the weights is missing, unknown, misshapen, not finite, or of another dtype."""


class DegreeError(SymflowError, ValueError):
    """A group was asked to act with a degree that it does not have."""


class SymmetryError(SymflowError, ValueError):
    """A claimed symmetry changes the function of the network."""


class EquivarianceError(SymflowError, ValueError):
    """A vector field is used on an architecture with more symmetry than the field respects."""


class NotIsometricError(SymflowError, TypeError):
    """A non-compact group has no distance: choose a section first."""


class UnsupportedModuleError(SymflowError, NotImplementedError):
    """The tracer meets a module or function without a rule, or cannot trace the module at all."""


class ConvergenceError(SymflowError, RuntimeError):
    """An iteration did not reach its tolerance. ``reached`` holds what it got to."""

    def __init__(self, message: str, reached: float) -> None:
        self.reached = reached
        Exception.__init__(self, f"{message} (reached {reached:.3g})")


class UnknownTaskError(SymflowError, ValueError):
    """A task was asked for by a name that symflow does not know."""


class DataNotFoundError(SymflowError, FileNotFoundError):
    """A data folder lacks the files that a task is read from."""


class FileFormatError(SymflowError, ValueError):
    """A file is truncated, foreign, or belongs to something else."""


class StateError(SymflowError, RuntimeError):
    """An object is used before it is ready, such as a flow sampled before it is fitted."""


class SymflowWarning(UserWarning):
    """Base class of every warning issued by symflow."""


class AntipodalWarning(SymflowWarning):
    """Two points of a sphere are antipodal: a shortest path was chosen among infinitely many."""


class DeadNeuronWarning(SymflowWarning):
    """Some neurons have no incoming (or no outgoing) weight and so no direction."""

    def __init__(self, count: int, message: str = "") -> None:
        self.count = count
        Warning.__init__(
            self,
            message or f"{count} dead neuron(s): zero, the limit of their scaling orbit, is kept",
        )
