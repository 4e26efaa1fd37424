"""The quotient of weight space: distances, geodesics and means of orbits."""

from symflow.quotient.geodesic import Geodesic
from symflow.quotient.mean import frechet_mean
from symflow.quotient.principal import Principal
from symflow.quotient.quotient import Quotient
from symflow.quotient.state import transport_state

__all__ = ["Geodesic", "Principal", "Quotient", "frechet_mean", "transport_state"]
