"""What a flow is assembled from, as a value that can be written to a file and read again."""

from dataclasses import asdict, dataclass
from typing import Any, final

from symflow.arch import Architecture
from symflow.errors import FileFormatError, ShapeError
from symflow.flows.coupling import Coupling, RunCoupling
from symflow.flows.path import GeodesicPath, Path
from symflow.flows.source import Gaussian, Source
from symflow.flows.time import BetaTime, TimeLaw
from symflow.sections import (
    BalancedSection,
    FlatSection,
    Section,
    SphereSection,
)

_PARTS: tuple[tuple[str, type[Any]], ...] = (
    ("path", Path),
    ("coupling", Coupling),
    ("time", TimeLaw),
    ("source", Source),
)


@final
@dataclass(frozen=True)
class Recipe:
    """The parts of a flow.

    Attributes
    ----------
    section
        Where states live: ``"flat"`` (raw weights), ``"sphere"`` or ``"balanced"``.
    preserves, bias
        Options of the sphere section. With ``preserves="argmax"`` the log-scale of the last layer
        is one more Euclidean coordinate of the state, so that samples have a temperature.
    path
        Geometry of the paths, and the noise around them.
    coupling
        Which start is paired with which end.
    time
        At which times the flow is trained.
    source
        Law of the initial weights; it should be the one the zoo was initialised with.
    alignment
        ``"none"``; ``"reference"``: all ends are aligned to the first one before training;
        ``"pair"``: every end is aligned to its start when they are paired.
    predicts
        What the network returns: the ``"end"`` of the path or the ``"velocity"``.
    project_end
        Whether predicted ends are put on the section inside the loss and at every step.

    Examples
    --------
    >>> Recipe(section="sphere").coupling
    RunCoupling()
    """

    section: str = "sphere"
    preserves: str = "function"
    bias: str = "joint"
    path: Path = GeodesicPath()
    coupling: Coupling = RunCoupling()
    time: TimeLaw = BetaTime()
    source: Source = Gaussian()
    alignment: str = "none"
    predicts: str = "end"
    project_end: bool = True

    def __post_init__(self) -> None:
        if self.alignment not in ("none", "reference", "pair"):
            raise ShapeError(
                f"alignment must be 'none', 'reference' or 'pair', got {self.alignment!r}"
            )
        if self.predicts not in ("end", "velocity"):
            raise ShapeError(f"predicts must be 'end' or 'velocity', got {self.predicts!r}")

    def build_section(self, arch: Architecture) -> Section:
        """Return the section of an architecture."""
        if self.section == "flat":
            return FlatSection(arch, isometric_only=False)
        if self.section == "balanced":
            return BalancedSection(arch)
        if self.section == "sphere":
            return SphereSection(arch, preserves=self.preserves, bias=self.bias)
        raise ShapeError(f"section must be 'flat', 'sphere' or 'balanced', got {self.section!r}")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able description."""
        plain = {
            key: getattr(self, key)
            for key in ("section", "preserves", "bias", "alignment", "predicts", "project_end")
        }
        for name, _ in _PARTS:
            part = getattr(self, name)
            plain[name] = {"class": type(part).__name__, **asdict(part)}
        return plain

    @staticmethod
    def from_json(config: dict[str, Any]) -> "Recipe":
        """Read a description; parts of the user's own are found if their module is imported.

        Raises
        ------
        FileFormatError
            If a part is unknown or its fields do not fit.

        Examples
        --------
        >>> Recipe.from_json(Recipe(section="flat").to_json()) == Recipe(section="flat")
        True
        """
        values = dict(config)
        try:
            for name, base in _PARTS:
                fields = dict(values[name])
                values[name] = _subclass(base, fields.pop("class"))(**fields)
            return Recipe(**values)
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"not the recipe of a flow: {error}") from error


def _subclass(base: type[Any], name: str) -> type[Any]:
    """Find a concrete part by the name of its class."""
    pending = [base]
    while pending:
        found = pending.pop()
        if found.__name__ == name:
            return found
        pending += found.__subclasses__()
    raise FileFormatError(
        f"unknown {base.__name__.lower()} {name!r}: import the module that has it"
    )
