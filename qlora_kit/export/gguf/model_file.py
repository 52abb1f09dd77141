"""A merged model as one GGUF file: written tensor by tensor, and read again to be verified.

Takes the parameters of a merged model one by one, in any order; the places of all tensors are in
the header, before the first of them. Never holds more than one tensor in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from qlora_kit.config import GgufTypeName
from qlora_kit.errors import VerificationError, first_line
from qlora_kit.export.gguf.encoding import (
    decode,
    encode,
    excess,
    file_type,
    stored_bytes,
    stored_type,
)
from qlora_kit.export.gguf.families import Architecture
from qlora_kit.export.gguf.vocabulary import Vocabulary
from qlora_kit.storage import write_by

_MOST_FAULTS = 5


@dataclass(frozen=True)
class Origin:
    """Where a file comes from, for its metadata.

    Attributes:
        base: hub id, known name, or folder of the base.
        adapter: name of the adapter.
    """

    base: str
    adapter: str

    def describe(self, writer: gguf.GGUFWriter, what: str) -> None:
        """Write who made what of which base."""
        base = self.base.rstrip("/").rpartition("/")[2]
        writer.add_name(f"{base} {self.adapter}")
        writer.add_basename(base)
        writer.add_finetune(self.adapter)
        writer.add_description(what)
        writer.add_tags(["qlora-kit", "qlora", "text-generation"])
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
        is_hub_id = self.base.count("/") == 1 and not self.base.startswith(("/", "."))
        if is_hub_id:
            writer.add_base_model_organization(0, self.base.partition("/")[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{self.base}")


@dataclass(frozen=True)
class GgufFile:
    """A model file in GGUF: what is written in it, and how it is read again.

    Attributes:
        file: the name of the file.
        architecture: the model, in llama.cpp's terms.
        vocabulary: its tokenizer.
        kind: type of the matrices.
        origin: where the model comes from.
    """

    file: str
    architecture: Architecture
    vocabulary: Vocabulary
    kind: GgufTypeName
    origin: Origin

    @property
    def form(self) -> str:
        """The form of the export, in words: "gguf q8_0"."""
        return f"gguf {self.kind}"

    @property
    def reader(self) -> str:
        """The library that reads the file when it is verified."""
        return f"gguf {version('gguf')}"

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        shapes = self.architecture.parameters.values()
        return sum(stored_bytes(stored_type(self.kind, shape), shape) for shape in shapes)

    def write(self, folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
        """Write the file.

        Args:
            folder: the folder of the file.
            tensors: every parameter of the merged model, fp32, in any order.

        Returns:
            The number of tensors, and their bytes.

        Raises:
            ModelError: a value is too large for the type.
            StorageError: the file could not be written.
        """
        names, extra = self.architecture.names(), self.architecture.extra_tensors()
        own = ((names[name], self.architecture.to_file(name, t)) for name, t in tensors)
        shapes = {names[name]: shape for name, shape in self.architecture.parameters.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in extra.items()}
        writer = self._described()
        write_by(
            folder / self.file,
            lambda path: write_tensors(path, writer, shapes, self.kind, chain(extra.items(), own)),
        )
        return len(shapes), self.bytes

    def _described(self) -> gguf.GGUFWriter:
        """Return a writer with all metadata."""
        writer = gguf.GGUFWriter(None, self.architecture.family.architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        self.origin.describe(writer, "A base model with a LoRA adapter merged in by qlora-kit.")
        sizes = [int(np.prod(shape)) for shape in self.architecture.parameters.values()]
        writer.add_size_label(gguf.size_label(sum(sizes), sum(sizes), 0, 0))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(file_type(self.kind))
        self.architecture.describe(writer)
        self.vocabulary.describe(writer)
        return writer

    # ------------------------------------------------------------ verifying

    def source(self, folder: Path) -> GgufSource:
        """Open the file, and check everything in it but the values of parameters.

        Raises:
            VerificationError: it cannot be read, or metadata are not what was to be written.
        """
        path = folder / self.file
        reader = opened(path)
        check_metadata(path, reader, self._described())
        names = {own: name for name, own in self.architecture.names().items()}
        found = {tensor.name: tensor for tensor in reader.tensors}
        for name, tensor in self.architecture.extra_tensors().items():
            read = None if name not in found else values(found.pop(name))
            if read is None or not torch.equal(read, tensor.float()):
                raise VerificationError(f"{path.name}: {name} is not as written; export again")
        return GgufSource({names.get(name, name): t for name, t in found.items()}, self)

    def excess(self, name: str, expected: Tensor, found: Tensor) -> float:
        """Return how far a parameter is from what was to be written, in roundings of its type.

        Args:
            name: the name of the parameter.
            expected: it, or some of its rows, fp32.
            found: the same as read from the file.
        """
        kind = stored_type(self.kind, self.architecture.parameters[name])
        if expected.dim() == 1:
            # A norm is stored as 1 + weight, and so exact to the last place of that.
            expected, found = (self.architecture.to_file(name, t) for t in (expected, found))
        return excess(expected, found, kind)


class GgufSource:
    """The parameters in a GGUF file, named and ordered as in transformers; a `TensorSource`."""

    gives_own = True

    def __init__(self, tensors: Mapping[str, Any], file: GgufFile) -> None:
        self._tensors, self._file = tensors, file

    @property
    def names(self) -> Sequence[str]:
        """The names, in the order of the file."""
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        """Return one parameter, fp32."""
        return self._file.architecture.from_file(name, values(self._tensors[name]))


# ---------------------------------------------------------------- any GGUF file


def write_tensors(
    path: Path,
    writer: gguf.GGUFWriter,
    shapes: Mapping[str, tuple[int, ...]],
    kind: GgufTypeName,
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a GGUF file.

    Args:
        path: the file.
        writer: has the metadata.
        shapes: shapes of all tensors, in the order in which they shall lie in the file.
        kind: type of the matrices.
        tensors: each of them once, in any order.
    """
    places: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        stored = stored_type(kind, shape)
        size = stored_bytes(stored, shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, stored)
        places[name] = end
        end = writer.ggml_pad(end + size, writer.data_alignment)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (out,) = writer.fout
        _write_data(out, out.tell(), places, end, writer.data_alignment, kind, tensors)
    finally:
        writer.close()


def _write_data(
    out: BinaryIO,
    header: int,
    places: Mapping[str, int],
    end: int,
    alignment: int,
    kind: GgufTypeName,
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    start = gguf.GGUFWriter.ggml_pad(header, alignment)
    # Readers count on the padding after the last tensor too.
    out.truncate(start + end)
    for name, tensor in tensors:
        out.seek(start + places[name])
        packed = encode(name, tensor, stored_type(kind, tuple(tensor.shape)))
        out.write(packed.data.cast("B"))


def opened(path: Path) -> gguf.GGUFReader:
    """Open a GGUF file with the library's reader.

    Raises:
        VerificationError: it is no whole GGUF file.
    """
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise VerificationError(
            f"{path.name}: cannot be read back ({first_line(error)}); expected a whole GGUF file; "
            "export again"
        ) from error


def values(tensor: Any) -> Tensor:
    """Return the values of a tensor that the reader found, fp32."""
    return decode(tensor.data, tensor.tensor_type)


def check_metadata(path: Path, reader: gguf.GGUFReader, expected: gguf.GGUFWriter) -> None:
    """Compare the metadata in a file with what was to be written.

    Raises:
        VerificationError: a field is missing, surplus or has another value.
    """
    wanted = {key: field.value for key, field in expected.kv_data[0].items()}
    found = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    faults = [
        f"{path.name}: the metadata field {key} is not as written; export again"
        for key in chain(wanted, found.keys() - wanted.keys())
        if key not in wanted or key not in found or not _is_same(wanted[key], found[key])
    ]
    if faults:
        raise VerificationError(*faults[:_MOST_FAULTS])


def _is_same(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, float):
        return bool(np.float32(wanted) == np.float32(found))
    if isinstance(wanted, list | tuple):
        return len(wanted) == len(found) and all(map(_is_same, wanted, found))
    if isinstance(wanted, bytes):
        return wanted == str(found).encode()
    return bool(wanted == found)


def named_tensors(reader: gguf.GGUFReader) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file by the names in it, fp32."""
    for tensor in reader.tensors:
        yield tensor.name, values(tensor)
