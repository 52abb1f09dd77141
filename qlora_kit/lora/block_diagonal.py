"""BD-LoRA: an A or a B of blocks on its diagonal, written out as a whole matrix.

Takes the matrix as PEFT stores it, one block above another; returns the matrix that it stands for.

Source: BD-LoRA, as PEFT 0.21 has it (`use_bdlora`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qlora_kit.errors import AdapterError
from qlora_kit.lora.files import BlockDiagonal


def written_out(
    path: str, pair: tuple[Tensor, Tensor], blocks: BlockDiagonal, where: object
) -> tuple[Tensor, Tensor]:
    """Return A (R, D) and B (K, R) of a layer, of which one may be stored in blocks.

    Args:
        path: the path of the layer.
        pair: A (R, D) or (R, D / blocks), and B (K, R) or (K, R / blocks).
        blocks: which layers have an A or a B of blocks.
        where: the folder, for an error.

    Raises:
        AdapterError: a matrix is not of whole blocks.
    """
    a, b = pair
    name = path.rpartition(".")[2]
    if _is_among(name, blocks.target_modules_bd_a):
        return _on_diagonal(path, a, blocks.nblocks, where), b
    if _is_among(name, blocks.target_modules_bd_b):
        return a, _on_diagonal(path, b, blocks.nblocks, where)
    return a, b


def _is_among(name: str, patterns: Sequence[str] | None) -> bool:
    return any(pattern in name for pattern in patterns or ())


def _on_diagonal(path: str, matrix: Tensor, count: int, where: object) -> Tensor:
    if len(matrix) % count:
        raise AdapterError(
            f"{where}: {path} has {len(matrix)} rows in {count} blocks (use_bdlora); expected "
            "blocks of one size; save the adapter again"
        )
    rows, columns = len(matrix) // count, matrix.shape[1]
    whole = matrix.new_zeros(count * rows, count * columns)
    for number, block in enumerate(matrix.chunk(count)):
        place = slice(number * rows, (number + 1) * rows)
        whole[place, number * columns : (number + 1) * columns] = block
    return whole
