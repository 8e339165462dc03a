"""Reading of safetensors checkpoints, sharded or not: memory-mapped, a slice at a time, never a second copy."""

import functools
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import UnsupportedModel
from engine.kernels import LinearWeight

CHUNK_BYTES = 1 << 26
_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


def resolve_checkpoint(path_or_hub_id: str | Path) -> Path:
    """The local folder of a checkpoint; a Hugging Face hub id is downloaded (or found in its cache) first."""
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or len(folder.parts) > 2:
        raise FileNotFoundError(f"{folder} is not a model folder (with config.json and *.safetensors) nor a hub id")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path_or_hub_id), allow_patterns=_FILES))


class WeightSource(Protocol):
    """Where a decoder's weights come from."""

    unread: set[str]

    def equal(self, copy: str, original: str) -> bool:
        """Whether ``copy`` is absent or holds the same matrix as ``original``; either way it needs no more reading."""

    def vector(self, name: str, size: int) -> Tensor:
        """A 1-d tensor of the given size as float32."""

    def read_into(self, weight: LinearWeight, first_row: int, name: str, rows: int) -> None:
        """Copies a [rows, weight.columns] tensor into ``weight`` from first_row on."""


class TensorSource:
    """The tensors of a model that is already in memory, by the names of its checkpoint."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.unread = set(tensors)

    def equal(self, copy: str, original: str) -> bool:
        if copy not in self._tensors:
            return True
        a, b = self._tensors[copy], self._tensors[original]
        same = a.data_ptr() == b.data_ptr() or torch.equal(a, b)
        if same:
            self.unread.discard(copy)
        return same

    def vector(self, name: str, size: int) -> Tensor:
        return self._take(name, [size]).detach().to(torch.float32, copy=True)

    def read_into(self, weight: LinearWeight, first_row: int, name: str, rows: int) -> None:
        weight.write(first_row, self._take(name, [rows, weight.columns]).detach())

    def _take(self, name: str, shape: list[int]) -> Tensor:
        if name not in self._tensors:
            raise UnsupportedModel(f"the tensors given have no {name!r}, which the configuration asks for")
        if list(self._tensors[name].shape) != shape:
            raise UnsupportedModel(
                f"tensor {name!r} has shape {list(self._tensors[name].shape)}, expected {shape} from the configuration"
            )
        self.unread.discard(name)
        return self._tensors[name]


class Checkpoint:
    """The tensors of a folder of safetensors files, by name. A context manager: it holds the files open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._slices: dict[str, Callable[[], Any]] = {}
        self.unread: set[str] = set()
        for file in _shards(folder):
            reader = self._stack.enter_context(safe_open(file, framework="pt"))
            for name in reader.keys():  # noqa: SIM118 (not a dict)
                self._slices[name] = functools.partial(reader.get_slice, name)
        self.unread = set(self._slices)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._slices.clear()

    def equal(self, copy: str, original: str) -> bool:
        """Whether ``copy`` is absent or holds the same matrix as ``original``; either way it needs no more reading."""
        if copy not in self._slices:
            return True
        a, b = self._slices[copy](), self._slices[original]()
        rows, columns = a.get_shape()
        step = max(1, CHUNK_BYTES // (4 * columns))
        same = a.get_shape() == b.get_shape() and all(
            torch.equal(a[i : min(rows, i + step)], b[i : min(rows, i + step)]) for i in range(0, rows, step)
        )
        if same:
            self.unread.discard(copy)
        return same

    def vector(self, name: str, size: int) -> Tensor:
        """A 1-d tensor of the given size as float32."""
        part = self._open(name, [size])
        return part[:].to(torch.float32).clone()

    def read_into(self, weight: LinearWeight, first_row: int, name: str, rows: int) -> None:
        """Copies a [rows, weight.columns] tensor into ``weight`` from first_row on, a bounded chunk at a time."""
        part = self._open(name, [rows, weight.columns])
        step = max(32, CHUNK_BYTES // (4 * weight.columns) // 32 * 32)
        for start in range(0, rows, step):
            weight.write(first_row + start, part[start : min(rows, start + step)])

    def _open(self, name: str, shape: list[int]) -> Any:
        if name not in self._slices:
            raise UnsupportedModel(
                f"the checkpoint in {self.folder} has no tensor {name!r}, which its config.json asks for"
            )
        part = self._slices[name]()
        if list(part.get_shape()) != shape:
            raise UnsupportedModel(
                f"tensor {name!r} has shape {list(part.get_shape())}, expected {shape} from config.json"
            )
        if not part.get_dtype().startswith(("F", "BF")):
            raise UnsupportedModel(f"tensor {name!r} has dtype {part.get_dtype()}: quantised weights are not supported")
        self.unread.discard(name)
        return part


def _shards(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists():  # as transformers has it; files of other formats may lie beside it
        files = [single]
    elif index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        raise FileNotFoundError(
            f"{folder} lacks {missing or 'any *.safetensors file'}; only safetensors checkpoints are read"
        )
    return files
