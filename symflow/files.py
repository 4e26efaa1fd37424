"""Reading and writing files: safetensors and JSON, atomically; nothing is ever unpickled.

A file is written beside its destination, flushed to disk, and moved over it in one step: whoever
reads sees the old file or the new one, never a half.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _decode
from safetensors.torch import save as _encode
from torch import Tensor

from symflow.errors import FileFormatError

_FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the contents of a file in one step.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_atomic(target, b"hello"); target.read_bytes()
    b'hello'
    """
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends, and not if it fails.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replacing(target) as file: _ = file.write(b"hello")
    >>> target.read_bytes()
    b'hello'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result should be as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@final
class TensorFile:
    """A safetensors file whose tensors are read one at a time, and never mapped into memory.

    Attributes
    ----------
    head
        Everything in front of the tensors, byte by byte.
    entries
        For each key the dtype, shape and offsets, as in the header.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "w.safetensors"
    >>> save_tensors(target, {"w": torch.ones(2)})
    >>> TensorFile(target).read("w")
    tensor([1., 1.])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            first = file.read(8)
            size = int.from_bytes(first, "little")
            whole = 8 < 8 + size <= self.path.stat().st_size
            self.head = first + (file.read(size) if whole else b"")
        try:
            header = json.loads(self.head[8:])
            self.entries: dict[str, dict[str, Any]] = {
                key: value for key, value in header.items() if key != "__metadata__"
            }
            ends = [value["data_offsets"][1] for value in self.entries.values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{path} is no safetensors file ({error})") from error
        if len(self.head) + max(ends, default=0) != self.path.stat().st_size:
            raise FileFormatError(f"{path} is no complete safetensors file: copy it again")

    def span(self, key: str) -> tuple[int, int]:
        """Return where the bytes of a tensor begin and end in the file."""
        begin, end = self.entries[key]["data_offsets"]
        return len(self.head) + begin, len(self.head) + end

    def raw(self, key: str) -> bytearray:
        """Read the bytes of a tensor."""
        begin, end = self.span(key)
        found = bytearray(end - begin)
        with self.path.open("rb") as file:
            file.seek(begin)
            file.readinto(found)
        return found

    def read(self, key: str) -> Tensor:
        """Read a floating point tensor.

        Raises
        ------
        FileFormatError
            If it is of another dtype.
        """
        dtype, data = self.dtype(key), self.raw(key)
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.zeros(0, dtype=dtype)
        return flat.reshape(self.entries[key]["shape"])

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a floating point tensor; the errors are those of :meth:`read`."""
        stored = self.entries[key]["dtype"]
        if stored not in _FORMATS:
            raise FileFormatError(f"{self.path}: {key!r} is {stored}, not floating point")
        return _FORMATS[stored]


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors as safetensors; ``meta`` is stored as JSON in the header's metadata.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "w.safetensors"
    >>> save_tensors(target, {"w": torch.ones(2)}, {"seed": 3})
    >>> load_tensors(target)
    ({'w': tensor([1., 1.])}, {'seed': 3})
    """
    packed = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    header = None if meta is None else {"symflow": json.dumps(meta, sort_keys=True)}
    write_atomic(path, _encode(packed, metadata=header))


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file and the metadata that :func:`save_tensors` put into it.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FileFormatError
        If the file is truncated or no safetensors file.
    """
    data = Path(path).read_bytes()
    try:
        tensors = _decode(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        meta = json.loads(header.get("symflow", "{}"))
    except (SafetensorError, ValueError, KeyError) as error:
        raise FileFormatError(
            f"{path} is no complete safetensors file ({error}); copy or write it again"
        ) from error
    return {key: torch.as_tensor(value) for key, value in tensors.items()}, meta


def save_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON, readable and with a final newline."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def load_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FileFormatError
        If the file is truncated or no JSON.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.json"
    >>> save_json(target, {"a": 1}); load_json(target)
    {'a': 1}
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is no complete JSON file ({error})") from error


def digest(*tensors: Tensor | None) -> str:
    """Hash tensors with their dtypes and shapes: what is resumed must be given the same data.

    Examples
    --------
    >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(None)
    (True, False)
    """
    found = hashlib.sha256()
    for x in tensors:
        if x is None:
            found.update(b"None")
            continue
        found.update(f"{x.dtype}{tuple(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def require_same(place: Any, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with what was begun under other settings.

    Parameters
    ----------
    place
        The file or folder, for the message.
    stored
        Settings as JSON gave them back.
    wanted
        Settings of this call; tuples count as the lists that JSON makes of them.

    Raises
    ------
    FileFormatError
        If they differ; it names each difference.

    Examples
    --------
    >>> require_same("here", {"widths": [3, 2]}, {"widths": (3, 2)})
    """
    plain = json.loads(json.dumps(wanted))
    differing = [
        f"{name}: there {stored.get(name)!r}, now {plain.get(name)!r}"
        for name in sorted(stored.keys() | plain.keys())
        if stored.get(name) != plain.get(name)
    ]
    if differing:
        raise FileFormatError(
            f"{place} was begun with other settings ({'; '.join(differing)}): give the same "
            "settings, or another folder"
        )
