"""The model card of an adapter: a README.md with what it was made of and how it did.

It goes where the adapter goes, so it holds no text of the data. `write_rendered_card` is for other
cards too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from qlora_kit.redact import redacted
from qlora_kit.report.facts import RunSummary, base_name
from qlora_kit.report.page import render
from qlora_kit.storage import write_text

NAME = "README.md"


def write_card(folder: Path, summary: RunSummary) -> None:
    """Write the model card into a run folder."""
    write_rendered_card(folder, "card.md.jinja", summary.base, "peft", "lora", summary=summary)


def write_rendered_card(
    folder: Path, template: str, base: str, library: str, tag: str, **shown: Any
) -> None:
    """Write a model card of what was made from a base.

    Args:
        folder: where it goes.
        template: of its text, in Markdown.
        base: hub id, known name, or folder; a hub links to the first.
        library: that loads what was made.
        tag: what was made, beside the tags that all cards have.
        shown: what the template names, beside `name` of the base and the `front` for the hub.

    Raises:
        StorageError: it could not be written.
    """
    front = ModelCardData(
        base_model=base if "/" in base and not base.startswith("/") else None,
        library_name=library,
        tags=[tag, "qlora", "qlora-kit"],
        pipeline_tag="text-generation",
    )
    text = render(template, front=front.to_yaml(), name=base_name(base), **shown)
    write_text(folder / NAME, redacted(ModelCard(text).content))
