"""Flow matching over weights: assembled from source, coupling, path, time law and network."""

from symflow.flows.coupling import Coupling, Independent, MiniBatchOT, Reordering, RunCoupling
from symflow.flows.flow import Flow, WeightZoo
from symflow.flows.guidance import Guidance
from symflow.flows.load import load
from symflow.flows.path import GeodesicPath, Path, Straight
from symflow.flows.presets import balanced, euclidean, geometric, normalized
from symflow.flows.recipe import Recipe
from symflow.flows.sampling import Optimised
from symflow.flows.settings import FitSettings
from symflow.flows.source import FanIn, Gaussian, Source
from symflow.flows.time import BetaTime, TimeLaw
from symflow.flows.together import fit_together
from symflow.flows.transfer import transfer

__all__ = [
    "BetaTime",
    "Coupling",
    "FanIn",
    "FitSettings",
    "Flow",
    "Gaussian",
    "GeodesicPath",
    "Guidance",
    "Independent",
    "MiniBatchOT",
    "Optimised",
    "Path",
    "Recipe",
    "Reordering",
    "RunCoupling",
    "Source",
    "Straight",
    "TimeLaw",
    "WeightZoo",
    "balanced",
    "euclidean",
    "fit_together",
    "geometric",
    "load",
    "normalized",
    "transfer",
]
