"""A LoRA adapter alone as GGUF, for llama.cpp to put on the GGUF file of its base.

Takes an adapter as it is stored and the architecture of its base; writes A and B under llama.cpp's
names, and reads them again. Refuses by name what llama.cpp does not add to a product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import gguf
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.config import GgufTypeName
from qlora_kit.errors import AdapterError, ConfigError, VerificationError
from qlora_kit.export.gguf.encoding import excess, file_type, stored_type
from qlora_kit.export.gguf.families import Architecture
from qlora_kit.export.gguf.model_file import (
    Origin,
    check_metadata,
    named_tensors,
    opened,
    write_tensors,
)
from qlora_kit.export.merge_report import WrittenForm
from qlora_kit.layers.projections import carriers
from qlora_kit.lora.adapter import check_layers
from qlora_kit.lora.stored import StoredAdapter
from qlora_kit.model.load import BaseSpec
from qlora_kit.storage import write_by

_MERGE = "export it merged, with --form gguf"


class AdapterFile:
    """An adapter in GGUF: what is written, and how it is read again.

    Args:
        file: the name of the file.
        stored: the adapter.
        spec: its base.
        kind: type of A and B.

    Raises:
        AdapterError: the adapter has a part that llama.cpp cannot use, or changes nothing.
        ConfigError: A and B cannot have the type.
        ModelError: the base is not of a known family.
    """

    def __init__(
        self, file: str, stored: StoredAdapter, spec: BaseSpec, kind: GgufTypeName
    ) -> None:
        if kind == "q8_0":
            raise ConfigError(
                "--gguf-type: q8_0 packs rows of 32 numbers, and those of an adapter are as short "
                "as its rank; expected f32, f16 or bf16; leave it out for f32"
            )
        skeleton = spec.skeleton()
        self._architecture = Architecture.of(spec.source.name, skeleton)
        _check(stored, spec, self._architecture, skeleton)
        self._file, self._stored, self._kind = file, stored, kind
        self._origin = Origin(spec.source.identity, stored.folder.resolve().name)
        # llama.cpp knows one alpha, and divides it by the rank of each layer.
        path = next(iter(stored.tensors))
        self._alpha = stored.scaling_of(path) * len(stored.tensors[path][0])
        self._expected = dict(self._tensors())

    def write(self, folder: Path) -> int:
        """Write the file, and return the bytes of the tensors.

        Raises:
            ModelError: a value is too large for the type.
            StorageError: the file could not be written.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self._expected.items()}
        writer = self._described()
        write_by(
            folder / self._file,
            lambda path: write_tensors(path, writer, shapes, self._kind, self._expected.items()),
        )
        return (folder / self._file).stat().st_size

    def verify(self, folder: Path) -> WrittenForm:
        """Read the file again, and compare everything in it with what was to be written.

        Raises:
            VerificationError: a field or a tensor is missing, surplus or has other values.
        """
        path = folder / self._file
        reader = opened(path)
        check_metadata(path, reader, self._described())
        found = dict(named_tensors(reader))
        if found.keys() != self._expected.keys():
            odd = sorted(found.keys() ^ self._expected.keys())
            raise VerificationError(
                f"{path.name}: {odd[0]} is missing or surplus ({len(odd)} such); expected A and B "
                "of every layer; export again"
            )
        largest, error, size = 0.0, 0.0, 0.0
        for name, expected in self._expected.items():
            kind = stored_type(self._kind, tuple(expected.shape))
            one = excess(expected, found[name], kind)
            if not one <= 1:
                raise VerificationError(
                    f"{name}: what was written differs from the adapter by {one:.3g} times the "
                    f"rounding of {self._kind}; expected at most 1; export again"
                )
            largest = max(largest, one)
            error += float((found[name] - expected).norm()) ** 2
            size += float(expected.norm()) ** 2
        return WrittenForm(
            form=f"gguf-adapter {self._kind}",
            tensors=len(found),
            relative_error=math.sqrt(error / size),
            largest_error=largest,
            reader=f"gguf {version('gguf')}",
        )

    def _described(self) -> gguf.GGUFWriter:
        writer = gguf.GGUFWriter(None, self._architecture.family.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, self._alpha)
        self._origin.describe(writer, "A LoRA adapter, trained by qlora-kit.")
        writer.add_file_type(file_type(self._kind))
        return writer

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield A (R, D) and B (K, R) of every layer by llama.cpp's names, fp32."""
        names = self._architecture.names()
        for path, (a, b) in self._stored.tensors.items():
            name = f"{path}.weight"
            # One where all layers have the scaling of the first, as they mostly have.
            share = self._stored.scaling_of(path) * len(a) / self._alpha
            yield f"{names[name]}.lora_a", a.float()
            yield f"{names[name]}.lora_b", self._architecture.to_file(name, b.float() * share)


def _check(
    stored: StoredAdapter, spec: BaseSpec, architecture: Architecture, skeleton: PreTrainedModel
) -> None:
    """Refuse an adapter that is more than A and B beside linear layers of its base."""
    check_layers(stored, carriers(skeleton), "the base")
    embedding = next(
        (path for path in stored.tensors if path.endswith("embed_tokens")), "embed_tokens"
    )
    lost = next(
        (path for path in stored.tensors if f"{path}.weight" not in architecture.parameters), ""
    )
    parts = (
        (bool(stored.magnitudes), "it has the lengths of DoRA"),
        (bool(stored.saved), f"it trained {next(iter(stored.saved), '')} whole"),
        (bool(stored.rows), "it trained rows of tokens"),
        (bool(stored.added), f"it has biases ({next(iter(stored.added), '')})"),
        (bool(stored.stacked), "it has LoRA on experts"),
        (bool(stored.kernels), "it has LoRA on convolutions"),
        (embedding in stored.tensors, f"it has LoRA on the embedding ({embedding})"),
        (bool(lost), f"it has LoRA on {lost}, which shares its weight with the embedding"),
        (stored.spec.variant.merge_aware, "it was trained merge-aware, as codes in 4 bits"),
        (spec.start is not None, "its start took a part out of the base"),
    )
    for found, what in parts:
        if found:
            raise AdapterError(
                f"{stored.folder}: {what}, which llama.cpp cannot add to a base; expected plain "
                f"LoRA on linear layers; {_MERGE}"
            )
    if stored.changes_nothing:
        raise AdapterError(
            f"{stored.folder}: A or B of every layer is zero ({len(stored.tensors)} layers); "
            "expected a trained adapter; train it, or name another"
        )
