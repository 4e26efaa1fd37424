"""Alignment: the element of the compact group that brings one network close to another."""

from symflow.align.activations import ActivationMatching
from symflow.align.base import Aligner, Alignment, PairedAligner, Status, objective
from symflow.align.bounds import objective_bound
from symflow.align.embed import Embedding, embed_narrow, widen
from symflow.align.frank_wolfe import FrankWolfe
from symflow.align.many import Centred, align_to_centre
from symflow.align.polished import Polished
from symflow.align.sinkhorn import Sinkhorn
from symflow.align.straight_through import StraightThrough
from symflow.align.streaming import FilesAligned, align_files
from symflow.align.weight_matching import WeightMatching
from symflow.align.weighted import Weighted

__all__ = [
    "ActivationMatching",
    "Aligner",
    "Alignment",
    "Centred",
    "Embedding",
    "FilesAligned",
    "FrankWolfe",
    "PairedAligner",
    "Polished",
    "Sinkhorn",
    "Status",
    "StraightThrough",
    "WeightMatching",
    "Weighted",
    "align_files",
    "align_to_centre",
    "embed_narrow",
    "objective",
    "objective_bound",
    "widen",
]
