"""Flow matching over weights: assembled from source, coupling, path, time law and network."""

from symflow.flows.coupling import Coupling, Independent, MiniBatchOT, RunCoupling
from symflow.flows.flow import Flow, WeightZoo
from symflow.flows.guidance import Guidance
from symflow.flows.load import load
from symflow.flows.path import GeodesicPath, Path, Straight
from symflow.flows.presets import balanced, euclidean, geometric, normalized
from symflow.flows.recipe import Recipe
from symflow.flows.settings import FitSettings
from symflow.flows.source import FanIn, Gaussian, Source
from symflow.flows.time import BetaTime, TimeLaw

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
    "Path",
    "Recipe",
    "RunCoupling",
    "Source",
    "Straight",
    "TimeLaw",
    "WeightZoo",
    "balanced",
    "euclidean",
    "geometric",
    "load",
    "normalized",
]
