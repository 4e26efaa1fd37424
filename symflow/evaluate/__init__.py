"""What networks do on data, what lies between them, and how far they are from each other."""

from symflow.evaluate.averaging import Averaged, averaged, weight_average
from symflow.evaluate.barrier import Barrier, Compared, barrier, compared
from symflow.evaluate.diversity import diversity
from symflow.evaluate.nearest import Nearest, nearest
from symflow.evaluate.normalisation import reset_normalisation
from symflow.evaluate.predict import (
    LabelledData,
    Split,
    accuracy,
    fit_temperature,
    loss,
    probabilities,
)
from symflow.evaluate.repair import repair

__all__ = [
    "Averaged",
    "Barrier",
    "Compared",
    "LabelledData",
    "Nearest",
    "Split",
    "accuracy",
    "averaged",
    "barrier",
    "compared",
    "diversity",
    "fit_temperature",
    "loss",
    "nearest",
    "probabilities",
    "repair",
    "reset_normalisation",
    "weight_average",
]
