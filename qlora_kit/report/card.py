"""The model card of an adapter: a README.md that says what it was made of and how well it did.

Takes the summary of a run; writes the card into a folder. The card goes wherever the adapter goes,
so it never holds text of the data. `write_rendered_card` writes other cards as well.
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
# The hub's words for what models of a task do.
_PIPELINES = {
    "classify": "text-classification",
    "tag": "token-classification",
    "seq2seq": "text2text-generation",
}


def write_card(folder: Path, summary: RunSummary) -> None:
    """Write the model card into a run folder."""
    kind = _PIPELINES.get(summary.task, "text-generation")
    if summary.of_images:
        kind = "image-classification"
    write_rendered_card(
        folder, "card.md.jinja", summary.base, "peft", "lora", kind, summary=summary
    )


def write_rendered_card(
    folder: Path,
    template: str,
    base: str,
    library: str,
    tag: str,
    kind: str = "text-generation",
    **shown: Any,
) -> None:
    """Write the model card of an adapter or a model that was made from a base.

    Args:
        folder: the folder of the card.
        template: the name of the card's template, in Markdown.
        base: hub id, known name, or folder of the base; a hub links to a hub id.
        library: the library that loads the adapter or model.
        tag: a tag for the card, beside the tags that all cards have.
        kind: the hub's word for what the model does.
        shown: values for the template, beside the `name` of the base and the `front` for the hub.

    Raises:
        StorageError: the card could not be written.
    """
    front = ModelCardData(
        base_model=base if "/" in base and not base.startswith("/") else None,
        library_name=library,
        tags=[tag, "qlora", "qlora-kit"],
        pipeline_tag=kind,
    )
    text = render(template, front=front.to_yaml(), name=base_name(base), **shown)
    write_text(folder / NAME, redacted(ModelCard(text).content))
