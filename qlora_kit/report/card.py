"""The model card of an adapter: a README.md with what it was made of and how it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from qlora_kit.redact import redacted
from qlora_kit.storage import write_text

NAME = "README.md"


def write_card(
    folder: Path,
    *,
    base: str,
    facts: Sequence[tuple[str, str]],
    results: Sequence[tuple[str, str]],
    versions: Mapping[str, str],
) -> None:
    """Write the model card into a run folder.

    Args:
        folder: run folder.
        base: hub id or name of the base.
        facts: what was trained on what, as in the header of the run.
        results: what was measured at its end.
        versions: of the libraries that computed it.
    """
    data = ModelCardData(
        base_model=base if "/" in base and not base.startswith("/") else None,
        library_name="peft",
        tags=["lora", "qlora", "qlora-kit"],
        pipeline_tag="text-generation",
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# LoRA adapter for {Path(base).name if base.startswith('/') else base}",
        "## Training\n\n" + _table(facts),
        "## Results\n\n" + _table(results),
        "![loss](loss.png)",
        "## Versions\n\n" + _table(list(versions.items())),
    ]
    card = ModelCard("\n\n".join(sections) + "\n").content
    write_text(folder / NAME, redacted(card))


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])
