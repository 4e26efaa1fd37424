"""The quotient of weight space: distances, geodesics and means of orbits."""

from symflow.quotient.geodesic import Geodesic
from symflow.quotient.mean import frechet_mean
from symflow.quotient.quotient import Quotient

__all__ = ["Geodesic", "Quotient", "frechet_mean"]
