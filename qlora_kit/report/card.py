"""The model card of an adapter: a README.md that says what it was made of and how well it did.

Takes the summary of a run; writes the card into a folder. The card goes wherever the adapter goes,
so it never holds text of the data. `write_rendered_card` writes other cards as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from qlora_kit.errors import AdapterError, DataError, StorageError, raised_as, said
from qlora_kit.redact import redacted
from qlora_kit.report.facts import RunSummary, base_name
from qlora_kit.report.page import render
from qlora_kit.report.tables import Rows
from qlora_kit.storage import read_text, write_text

NAME = "README.md"
# The hub's words for what models of a task do.
_PIPELINES = {
    "classify": "text-classification",
    "tag": "token-classification",
    "seq2seq": "text2text-generation",
}


@dataclass(frozen=True)
class ForHub:
    """What a hub is told of a model beside its base and its task.

    Attributes:
        license: its licence, by the hub's name.
        datasets: ids of the hub's data sets that it learnt from.
        metrics: figures that were measured, by name.
        measured_on: what they were measured on, in words.
    """

    license: str | None = None
    datasets: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    measured_on: str = "validation rows of the run"


def write_card(folder: Path, summary: RunSummary) -> None:
    """Write the model card into a run folder."""
    kind = _PIPELINES.get(summary.task, "text-generation")
    if summary.of_images:
        kind = "image-classification"
    told = ForHub(datasets=summary.datasets, metrics=summary.metrics)
    write_rendered_card(
        folder, "card.md.jinja", summary.base, "peft", "lora", kind, told, summary=summary
    )


def front_of(folder: Path) -> ForHub:
    """Return licence and data sets that the card in a folder names; nothing where it names none."""
    try:
        named = _read(folder).data
    except (AdapterError, StorageError, DataError):
        return ForHub()  # a stranger's card decides nothing about a merge
    datasets = named.datasets if isinstance(named.datasets, list) else [named.datasets]
    license_ = named.license if isinstance(named.license, str) else None
    return ForHub(license_, tuple(each for each in datasets if isinstance(each, str)))


def finish_card(folder: Path, base: str, was: str, license_: str | None, facts: Rows) -> None:
    """Put into the card of an adapter what is decided when it is exported.

    Args:
        folder: the folder of the adapter. Where it has no card, a short one is written.
        base: what the adapter names as its base; the card names the same.
        was: what it named before.
        license_: the licence, by the hub's name; None to leave it as it is.
        facts: what a short card says of the adapter.

    Raises:
        AdapterError: the card begins with something that is no YAML.
        StorageError: the card could not be written.
    """
    if not (folder / NAME).is_file():
        told = ForHub(license_)
        write_rendered_card(
            folder, "adapter_card.md.jinja", base, "peft", "lora", told=told, facts=facts
        )
        return
    card = _read(folder)
    if license_ is not None:
        card.data.license = license_
    if (id_ := _hub_id(base)) is not None:
        card.data.base_model = id_
    text = str(card)
    if Path(was).is_absolute():
        text = text.replace(was, base)
    write_text(folder / NAME, redacted(text))


def _read(folder: Path) -> Any:
    path = folder / NAME

    def line(error: Exception) -> str:
        return f"{path}: no model card ({said(error)}); correct it, or remove it"

    with raised_as(AdapterError, line):
        return ModelCard(read_text(path))


def _hub_id(base: str) -> str | None:
    return base if "/" in base and not base.startswith("/") else None


def write_rendered_card(
    folder: Path,
    template: str,
    base: str,
    library: str,
    tag: str,
    kind: str = "text-generation",
    told: ForHub | None = None,
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
        told: what else a hub is told.
        shown: values for the template, beside the `name` of the base and the `front` for the hub.

    Raises:
        StorageError: the card could not be written.
    """
    told = told or ForHub()
    results = [
        EvalResult(
            task_type=kind, dataset_type="held-out", dataset_name=told.measured_on,
            metric_type=metric, metric_value=float(f"{value:.6g}"),
        )
        for metric, value in told.metrics.items()
    ]  # fmt: skip
    front = ModelCardData(
        base_model=_hub_id(base),
        library_name=library,
        license=told.license,
        datasets=[*told.datasets] or None,
        tags=[tag, "qlora", "qlora-kit"],
        pipeline_tag=kind,
        model_name=f"{base_name(base)}, {tag}" if results else None,
        eval_results=results or None,
    )
    text = render(template, front=front.to_yaml(), name=base_name(base), **shown)
    write_text(folder / NAME, redacted(ModelCard(text).content))
