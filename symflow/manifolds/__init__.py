"""Section spaces as geoopt manifolds: the objects that sections, paths and solvers share."""

from symflow.manifolds.balanced import BalancedCone
from symflow.manifolds.base import WeightManifold
from symflow.manifolds.cone import ConeProduct
from symflow.manifolds.flat import Flat
from symflow.manifolds.rows import RowManifold
from symflow.manifolds.sphere import SphereProduct, sphere_exp, sphere_log, sphere_transport

__all__ = [
    "BalancedCone",
    "ConeProduct",
    "Flat",
    "RowManifold",
    "SphereProduct",
    "WeightManifold",
    "sphere_exp",
    "sphere_log",
    "sphere_transport",
]
