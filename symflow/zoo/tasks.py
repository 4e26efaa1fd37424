"""Tasks: labelled data, split and standardised, from scikit-learn or from IDX files."""

import gzip
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from symflow.errors import DataNotFoundError, FileFormatError, ShapeError, UnknownTaskError
from symflow.files import digest
from symflow.flows.require import number, whole

# An IDX file begins with two zero bytes, a type code (8: unsigned byte) and its number of
# dimensions (LeCun, Cortes and Burges, 1998).
_UNSIGNED_BYTE = 8


@final
@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """Labelled inputs for classification, split into training and test examples.

    Attributes
    ----------
    name
        What the task is called in files and tables.
    x_train, x_test
        Inputs (n, *features), floating point and finite, standardised.
    y_train, y_test
        Classes (n,), int64, from 0 to ``classes - 1``.
    classes
        Number of classes.

    Raises
    ------
    ShapeError
        If shapes or types do not fit, an input is not finite, or a label is out of range.

    Examples
    --------
    >>> x, y = torch.eye(4), torch.tensor([0, 1, 0, 1])
    >>> Task("toy", x, y, x, y, classes=2)
    Task('toy': 4 training and 4 test examples of shape (4,), 2 classes)
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ShapeError(f"classes must be at least 2, got {self.classes}")
        _check_split("train", self.x_train, self.y_train, self.classes)
        _check_split("test", self.x_test, self.y_test, self.classes)
        one, two = self.x_train, self.x_test
        if (one.shape[1:], one.dtype) != (two.shape[1:], two.dtype):
            raise ShapeError(
                f"x_train and x_test must hold the same features: {tuple(one.shape[1:])} "
                f"{one.dtype} against {tuple(two.shape[1:])} {two.dtype}"
            )

    @cached_property
    def digest(self) -> str:
        """A hash of all inputs and labels: a resumed training is refused other data."""
        return digest(self.x_train, self.y_train, self.x_test, self.y_test)

    def __repr__(self) -> str:
        return (
            f"Task({self.name!r}: {len(self.x_train)} training and {len(self.x_test)} test "
            f"examples of shape {tuple(self.x_train.shape[1:])}, {self.classes} classes)"
        )


def _check_split(split: str, x: Tensor, y: Tensor, classes: int) -> None:
    if x.ndim < 2 or not x.is_floating_point() or len(x) == 0:
        raise ShapeError(
            f"x_{split} must be floating point inputs (n >= 1, *features), got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise ShapeError(
            f"y_{split} must be {len(x)} int64 labels, one for each input, got {y.dtype} of shape "
            f"{tuple(y.shape)}"
        )
    bad = int((~x.isfinite()).sum())
    if bad:
        raise ShapeError(
            f"x_{split} holds {bad} NaN or infinite value(s): drop or impute those examples"
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise ShapeError(
            f"y_{split} must hold classes from 0 to {classes - 1}, got labels from {low} to {high}"
        )


def breast_cancer(test_fraction: float = 0.2, seed: int = 0) -> Task:
    """Wisconsin diagnostic breast cancer (Street, Wolberg and Mangasarian, 1993), 569 x 30.

    It ships inside scikit-learn. The split is stratified; each feature is standardised by its mean
    and deviation over the training examples.

    Parameters
    ----------
    test_fraction
        Share of each class that is held out.
    seed
        Of the split.

    Raises
    ------
    ShapeError
        If ``test_fraction`` is no number or leaves a class without training or test examples.

    Examples
    --------
    >>> breast_cancer()
    Task('breast_cancer': 456 training and 113 test examples of shape (30,), 2 classes)
    """
    from sklearn.datasets import load_breast_cancer

    return _from_sklearn("breast_cancer", load_breast_cancer, test_fraction, seed, by_feature=True)


def digits(test_fraction: float = 0.2, seed: int = 0) -> Task:
    """Handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak, 1998), 1797 x 64.

    They ship inside scikit-learn. The split is stratified; all pixels are standardised by one mean
    and one deviation of the training images, since some pixels are constant.

    Parameters
    ----------
    test_fraction
        Share of each class that is held out.
    seed
        Of the split.

    Raises
    ------
    ShapeError
        If ``test_fraction`` is no number or leaves a class without training or test examples.

    Examples
    --------
    >>> digits()
    Task('digits': 1438 training and 359 test examples of shape (64,), 10 classes)
    """
    from sklearn.datasets import load_digits

    return _from_sklearn("digits", load_digits, test_fraction, seed, by_feature=False)


def mnist(folder: str | os.PathLike[str] | None = None) -> Task:
    """MNIST (LeCun, Cortes and Burges, 1998) from its four IDX files; see :func:`idx`.

    Parameters
    ----------
    folder
        Where the files are; by default ``mnist`` inside the folder that the environment variable
        ``SYMFLOW_DATA`` names.

    Raises
    ------
    DataNotFoundError
        If the files are not there; it says which to put where.

    Examples
    --------
    >>> task = mnist("data/mnist")                                     # doctest: +SKIP
    """
    if folder is None:
        data = os.environ.get("SYMFLOW_DATA")
        if not data:
            raise DataNotFoundError(
                "no folder was given for MNIST and SYMFLOW_DATA is not set: put the four IDX files "
                f"({', '.join(_FILES)}; .gz or not) into a folder `mnist` and set SYMFLOW_DATA to "
                "its parent, or call mnist(folder)"
            )
        folder = Path(data) / "mnist"
    return _read_idx(Path(folder), "mnist")


def idx(folder: str | os.PathLike[str]) -> Task:
    """Any data set of images in the four files of MNIST's format, ``.gz`` or not.

    The names are the standard ones, ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
    ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte`` (``.idx3-`` instead of ``-idx3-`` is
    understood too). Images become rows of pixels, are divided by 255, and are standardised by one
    mean and one deviation over all pixels of the training images.

    Parameters
    ----------
    folder
        Where the files are; its name becomes the name of the task.

    Raises
    ------
    DataNotFoundError
        If a file is missing; it says which to put where.
    FileFormatError
        If a file is truncated or no IDX file of unsigned bytes, images have no pixels, or counts
        and labels do not fit.

    Examples
    --------
    >>> task = idx("data/fashion-mnist")                               # doctest: +SKIP
    """
    return _read_idx(Path(folder), Path(folder).resolve().name)


_KNOWN: dict[str, Callable[[], Task]] = {
    "breast_cancer": breast_cancer,
    "digits": digits,
    "mnist": mnist,
}


def task(name: str | os.PathLike[str]) -> Task:
    """Return a task by its name, or read one from a folder of IDX files.

    Parameters
    ----------
    name
        ``breast_cancer``, ``digits`` or ``mnist``; the path of a folder; or the name of a folder
        inside the one that ``SYMFLOW_DATA`` names.

    Raises
    ------
    UnknownTaskError
        If there is neither a task nor a folder of that name; it lists the tasks.
    DataNotFoundError, FileFormatError
        As :func:`idx`.

    Examples
    --------
    >>> task("digits").classes
    10
    """
    key = str(name)
    if key in _KNOWN:
        return _KNOWN[key]()
    data = os.environ.get("SYMFLOW_DATA")
    if not Path(key).is_dir() and data and (Path(data) / key).is_dir():
        return idx(Path(data) / key)
    if Path(key).is_dir() or not isinstance(name, str) or Path(key).name != key:
        return idx(key)
    raise UnknownTaskError(
        f"unknown task {key!r}: the known ones are {', '.join(_KNOWN)}; for images of your own "
        "give the path of a folder of IDX files, or its name inside the folder that SYMFLOW_DATA "
        "names"
    )


# ---------------------------------------------------------------- scikit-learn


def _from_sklearn(
    name: str, load: Callable[[], Any], test_fraction: float, seed: int, *, by_feature: bool
) -> Task:
    test_fraction, seed = number("test_fraction", test_fraction), whole("seed", seed)
    data = load()
    x = torch.as_tensor(np.asarray(data.data, dtype=np.float64))
    y = torch.as_tensor(np.asarray(data.target, dtype=np.int64))
    train, test = _stratified(y, test_fraction, seed)
    x_train, x_test = _standardise(x[train], x[test], by_feature=by_feature)
    return Task(name, x_train, y[train], x_test, y[test], int(y.max()) + 1)


def _stratified(y: Tensor, test_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    train: list[Tensor] = []
    test: list[Tensor] = []
    for label in y.unique():
        members = (y == label).nonzero()[:, 0]
        count = round(test_fraction * len(members))
        if not 0 < count < len(members):
            raise ShapeError(
                "test_fraction must leave training and test examples of each class; "
                f"{test_fraction} holds out {count} of {len(members)} of class {int(label)}"
            )
        members = members[torch.randperm(len(members), generator=generator)]
        test.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def _standardise(train: Tensor, test: Tensor, *, by_feature: bool) -> tuple[Tensor, Tensor]:
    """Shift and scale by statistics of the training inputs; return float32."""
    dims = (0,) if by_feature else tuple(range(train.ndim))
    mean = train.mean(dims, keepdim=True)
    std = train.std(dims, keepdim=True, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    return ((train - mean) / std).float(), ((test - mean) / std).float()


# ---------------------------------------------------------------- IDX

_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _read_idx(folder: Path, name: str) -> Task:
    paths = [_find(folder, file) for file in _FILES]
    missing = [file for file, path in zip(_FILES, paths, strict=True) if path is None]
    if missing:
        raise DataNotFoundError(
            f"{folder} lacks {', '.join(missing)}: put the IDX files of the data set there, each "
            "as it is or with .gz"
        )
    found = [path for path in paths if path is not None]
    images, labels = ([_idx_array(p, n) for p in found[k::2]] for k, n in ((0, 3), (1, 1)))
    for k, (x, y) in enumerate(zip(images, labels, strict=True)):
        if len(x) != len(y) or len(x) == 0:
            raise FileFormatError(
                f"{found[2 * k]} holds {len(x)} images and {found[2 * k + 1]} {len(y)} labels: "
                "wanted as many, and at least one; the files belong to different data sets"
            )
    for k, x in enumerate(images):
        if x.size == 0:
            raise FileFormatError(
                f"{found[2 * k]}: wanted images of at least one pixel, got {len(x)} of "
                f"{x.shape[1]} x {x.shape[2]}; copy the file again"
            )
    if images[0].shape[1:] != images[1].shape[1:]:
        raise FileFormatError(
            f"{found[2]}: wanted images of {images[0].shape[1:]} pixels as in {found[0]}, got "
            f"{images[1].shape[1:]}"
        )
    classes = int(labels[0].max()) + 1
    if int(labels[1].max()) >= classes:
        raise FileFormatError(
            f"{found[3]}: label {int(labels[1].max())} has no training example; the labels of "
            f"{found[1]} go from 0 to {classes - 1}"
        )
    pixels = [torch.as_tensor(x.reshape(len(x), -1).astype(np.float32)) / 255 for x in images]
    x_train, x_test = _standardise(*pixels, by_feature=False)
    y_train, y_test = (torch.as_tensor(y.astype(np.int64)) for y in labels)
    return Task(name, x_train, y_train, x_test, y_test, classes)


def _find(folder: Path, file: str) -> Path | None:
    spellings = (file, file.replace("-idx", ".idx"))
    candidates = [folder / (name + end) for name in spellings for end in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


def _idx_array(path: Path, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes with ``ndim`` dimensions."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise FileFormatError(f"{path} is no complete gzip file ({error})") from error
    start = 4 + 4 * ndim
    magic = bytes((0, 0, _UNSIGNED_BYTE, ndim))
    if len(data) < start or data[:4] != magic:
        raise FileFormatError(
            f"{path}: wanted an IDX file of unsigned bytes with {ndim} dimension(s), which begins "
            f"with {magic.hex(' ')}; it has {len(data)} bytes and begins with {data[:4].hex(' ')}"
        )
    shape = struct.unpack(f">{ndim}I", data[4:start])
    size = start + int(np.prod(shape, dtype=np.int64))
    if len(data) != size:
        raise FileFormatError(
            f"{path}: wanted {size} bytes for shape {shape}, got {len(data)}; the file is "
            "truncated or damaged: copy it again"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
