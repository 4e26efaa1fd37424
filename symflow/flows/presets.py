"""Ready-made flows: the three of the source thesis, corrected, and ours."""

from typing import Any

from symflow.arch import Architecture
from symflow.flows.coupling import Coupling, RunCoupling
from symflow.flows.flow import Flow
from symflow.flows.path import GeodesicPath, Straight
from symflow.flows.recipe import Recipe
from symflow.flows.source import Gaussian, Source
from symflow.nn import VectorField


def euclidean(
    arch: Architecture,
    *,
    source: Source = Gaussian(),
    coupling: Coupling = RunCoupling(),
    noise: float = 0.0,
    bridge: float = 0.0,
    field: VectorField | None = None,
    **options: Any,
) -> Flow:
    """Straight lines between raw weights.

    Parameters
    ----------
    arch
        The architecture.
    source
        Law of the initial weights.
    coupling
        Which start goes with which end; with a coupling other than :class:`RunCoupling` the ends
        are aligned to the first network.
    noise, bridge
        Path noise, see :class:`~symflow.flows.Straight`.
    field
        The network; a :class:`~symflow.nn.RelationalTransformer` with ``options`` by default.

    Examples
    --------
    >>> import symflow
    >>> euclidean(symflow.mlp([2, 3, 2]), width=8, depth=1).recipe.section
    'flat'
    """
    recipe = Recipe(
        section="flat",
        path=Straight(noise, bridge),
        coupling=coupling,
        source=source,
        alignment=_alignment(coupling),
        project_end=False,
    )
    return Flow(arch, recipe, field, **options)


def normalized(
    arch: Architecture,
    *,
    source: Source = Gaussian(),
    coupling: Coupling = RunCoupling(),
    noise: float = 0.0,
    bridge: float = 0.0,
    field: VectorField | None = None,
    **options: Any,
) -> Flow:
    """Straight lines between points of the sphere section; predicted ends are put on it.

    The last layer is on a sphere too; the log-scale that this removes is one more coordinate.
    Parameters as for :func:`euclidean`.

    Examples
    --------
    >>> import symflow
    >>> normalized(symflow.mlp([2, 3, 2]), width=8, depth=1).extra
    1
    """
    recipe = Recipe(
        section="sphere",
        preserves="argmax",
        path=Straight(noise, bridge),
        coupling=coupling,
        source=source,
        alignment=_alignment(coupling),
    )
    return Flow(arch, recipe, field, **options)


def geometric(
    arch: Architecture,
    *,
    source: Source = Gaussian(),
    coupling: Coupling = RunCoupling(),
    noise: float = 0.0,
    bridge: float = 0.0,
    field: VectorField | None = None,
    **options: Any,
) -> Flow:
    """Geodesics of the sphere section: every state is a normalised network.

    The last layer is on a sphere too; the log-scale that this removes is one more coordinate.
    Parameters as for :func:`euclidean`.

    Examples
    --------
    >>> import symflow
    >>> geometric(symflow.mlp([2, 3, 2]), width=8, depth=1).space.name
    'SphereProduct'
    """
    recipe = Recipe(
        section="sphere",
        preserves="argmax",
        path=GeodesicPath(noise, bridge),
        coupling=coupling,
        source=source,
        alignment=_alignment(coupling),
    )
    return Flow(arch, recipe, field, **options)


def balanced(
    arch: Architecture,
    *,
    source: Source = Gaussian(),
    coupling: Coupling = RunCoupling(),
    noise: float = 0.0,
    bridge: float = 0.0,
    field: VectorField | None = None,
    **options: Any,
) -> Flow:
    """Straight lines between balanced weights, each pair aligned; samples are rebalanced.

    The function is never changed by the section, so there is no temperature to keep.
    Parameters as for :func:`euclidean`.

    Examples
    --------
    >>> import symflow
    >>> balanced(symflow.mlp([2, 3, 2]), width=8, depth=1).recipe.alignment
    'pair'
    """
    recipe = Recipe(
        section="balanced",
        path=Straight(noise, bridge),
        coupling=coupling,
        source=source,
        alignment="pair",
        project_end=False,
    )
    return Flow(arch, recipe, field, **options)


def _alignment(coupling: Coupling) -> Any:
    """Align unless runs are paired with themselves: a run keeps its order of neurons."""
    return "none" if isinstance(coupling, RunCoupling) else "reference"
