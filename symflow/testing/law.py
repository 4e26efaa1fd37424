"""What a law is: a statement about something drawn, which names what breaks it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException
from hypothesis.strategies import DataObject, SearchStrategy
from torch import Tensor

from symflow.numerics import tolerance


@final
@dataclass(frozen=True)
class Law:
    """A statement that can be tried.

    Attributes
    ----------
    name
        Its name, which the failure repeats.
    check
        Tries it on drawn examples, as many as it is told or else the active Hypothesis profile
        says; raises ``AssertionError`` where it does not hold.

    Examples
    --------
    >>> print(Law("nothing", lambda max_examples: None))
    nothing
    """

    name: str
    check: Callable[..., None]

    def __str__(self) -> str:
        return self.name


@final
class Draws:
    """What was drawn for one example, by name, so that a failure can show it."""

    def __init__(self, data: DataObject) -> None:
        self._data = data
        self.seen: dict[str, Any] = {}

    def __call__(self, name: str, strategy: SearchStrategy[Any]) -> Any:
        """Draw a value and remember it under a name."""
        self.seen[name] = self._data.draw(strategy)
        return self.seen[name]

    def __str__(self) -> str:
        return "".join(f"\n  {name} = {_shown(value)}" for name, value in self.seen.items())


Body = Callable[[Any, Draws], None]


# Networks are slow to draw, and a law may be tried inside a test of the caller's.
_UNCHECKED = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.nested_given,
]


def law(
    name: str, subject: SearchStrategy[Any], body: Body, *, told: Callable[[Any], str] = str
) -> Law:
    """Make a law out of a body that raises on a counterexample.

    The number of examples and whether they are derandomised come from the active Hypothesis
    profile.

    Parameters
    ----------
    name
        Name of the law.
    subject
        Strategy for what the law is about, such as ``st.just(group)``.
    body
        Called with the subject and the draws.
    told
        Names the subject in the failure.

    Examples
    --------
    >>> def even(n, draw):
    ...     demand(n % 2 == 0, f"{n} is odd")
    >>> try: law("even", st.integers(0, 9), even).check()
    ... except AssertionError as error: print(error)
    law 'even' is broken by 1: 1 is odd
    """

    def check(max_examples: int | None = None) -> None:
        causes: list[Exception] = []

        def example(data: DataObject) -> None:
            draws = Draws(data)
            about = data.draw(subject)
            try:
                body(about, draws)
                return
            except HypothesisException:
                raise
            except Exception as error:
                causes.append(error)
            # Raised here, without its cause: Hypothesis tells failures apart by their causes, and
            # whatever breaks the law is one failure to it.
            cause = _cause(causes[-1])
            raise AssertionError(f"law {name!r} is broken by {told(about)}: {cause}{draws}")

        options = settings(
            max_examples=settings().max_examples if max_examples is None else max_examples,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=_UNCHECKED,
        )
        try:
            options(given(st.data())(example))()
        except AssertionError as failure:
            raise failure from causes[-1]

    return Law(name, check)


def demand(holds: bool, message: str) -> None:
    """Raise ``AssertionError`` with a message unless ``holds``.

    Examples
    --------
    >>> demand(True, "never said")
    """
    if not holds:
        raise AssertionError(message)


def agree(
    got: Tensor, wanted: Tensor, what: str, *, factor: float = 1.0, scale: float = 1.0
) -> None:
    """Demand that two tensors are equal up to rounding.

    Parameters
    ----------
    got, wanted
        Tensors; the coarser dtype of the two says what rounding is.
    what
        What is being compared, in words.
    factor
        Multiple of the table's tolerance.
    scale
        Magnitude of intermediate results, where that is greater than what comes out.

    Examples
    --------
    >>> agree(torch.ones(2), torch.ones(2), "ones")
    """
    # No demand() here: called this often, its messages would cost more than what is compared.
    if got.shape != wanted.shape:
        raise AssertionError(f"{what}: shape {size_of(got)}, wanted {size_of(wanted)}")
    if not got.numel():
        return
    coarse = min((got.dtype, wanted.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    got, wanted = got.detach().double(), wanted.detach().double()
    size = max(scale, float(got.abs().max()), float(wanted.abs().max()))
    error = float((got - wanted).abs().max())
    limit = factor * tolerance(coarse).close * size
    if not error <= limit:  # so that NaN is refused
        raise AssertionError(f"{what}: off by {error:.3g}, allowed {limit:.3g}")


def size_of(x: Tensor) -> str:
    """Return the shape of a tensor as text.

    Examples
    --------
    >>> size_of(torch.zeros(2, 3))
    '(2, 3)'
    """
    return str(tuple(x.shape))


def _cause(error: Exception) -> str:
    return str(error) if type(error) is AssertionError else f"{type(error).__name__}: {error}"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.tolist()) if value.numel() <= 64 else f"tensor of shape {size_of(value)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_shown(item)}' for key, item in value.items())}}}"
    return str(value)
