"""The merge report, for people: rows for the terminal, a picture, and a model card.

Takes the content of `merge_report.json`, so a stored report can be shown the same way. Writes only
the files it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_kit.report.card import ForHub, write_rendered_card
from qlora_kit.report.facts import base_name
from qlora_kit.report.plot import new_figure, save_figure
from qlora_kit.report.tables import Rows

PICTURE = "merge_report.png"
_MOST_LAYERS = 20
_NAMES = {
    "base": "base, no adapter",
    "adapter": "adapter on its base",
    "merged_over_quantized": "over quantized",
    "merged_over_original": "over original",
    "requantized": "quantised again",
    "peft_form": "rank-2R form, base as stored",
    "written": "written",
}
Report = Mapping[str, Any]


def written_as(report: Report) -> str:
    """Return in a few words what was written: the base that was merged into, and the dtype."""
    if report["is_requantized"]:
        return f"over {report['merged_over']}, {report['quantization']['bits']} bits"
    return f"over {report['merged_over']}, {report['dtype']}"


def variant_rows(report: Report) -> Rows:
    """Return a row for each variant that was measured."""
    rows = []
    for each in report["variants"]:
        name = _NAMES[each["variant"]]
        numbers = (
            f"loss {each['loss']:.4f}  KL {each['mean_kl']:.1e} (most {each['max_kl']:.0e})  "
            f"top-1 {each['top1_agreement']:.1%}"
        )
        rows.append((name, numbers))
    return tuple(rows)


def layer_rows(report: Report, most: int) -> Rows:
    """Return a row for each of the layers whose delta is smallest beside its quantisation error.

    Args:
        report: the merge report.
        most: the number of layers.
    """
    return tuple((layer["path"], _layer(layer)) for layer in report["layers"][:most])


def _layer(layer: Mapping[str, Any]) -> str:
    parts = [f"‖ΔW‖ {layer['delta']:.2g}"]
    if layer["quantization_error"] is not None:
        ratio = "∞" if layer["ratio"] is None else f"{layer['ratio']:.2f}"
        parts.append(f"‖W−deq(W)‖ {layer['quantization_error']:.2g}, ratio {ratio}")
    kept = f"kept {layer['kept']:.0%}"
    if layer["requantized_kept"] not in (None, layer["kept"]):
        kept += f", quantised again {layer['requantized_kept']:.0%}"
    return "  ".join([*parts, kept])


# ---------------------------------------------------------------- the picture


def draw_layers(report: Report, path: Path) -> None:
    """Draw the change of each layer by quantising and by training, the worst layer first.

    Raises:
        StorageError: the picture could not be written.
    """
    layers = report["layers"]
    figure, (sizes, shares) = new_figure(8, 6, plots=2)
    x = list(range(1, len(layers) + 1))
    if any(layer["quantization_error"] for layer in layers):
        errors = [layer["quantization_error"] for layer in layers]
        sizes.plot(x, errors, color="tab:orange", marker=".", label="‖W − deq(W)‖, by quantising")
    deltas = [layer["delta"] for layer in layers]
    sizes.plot(x, deltas, color="tab:blue", marker=".", label="‖ΔW‖, by training")
    if any(delta > 0 for delta in deltas):
        sizes.set_yscale("log")
    sizes.set_ylabel("norm of the change of W")
    sizes.legend()
    sizes.grid(alpha=0.25)
    shares.plot(
        x, [layer["kept"] for layer in layers], color="tab:blue", marker=".",
        label=f"as written ({written_as(report)})",
    )  # fmt: skip
    if layers and layers[0]["requantized_kept"] is not None and not report["is_requantized"]:
        again = [layer["requantized_kept"] for layer in layers]
        shares.plot(x, again, color="tab:red", marker=".", label="quantised again")
    shares.axhline(1.0, color="tab:gray", linewidth=0.8)
    shares.set_ylabel("share of ΔW that is left")
    shares.set_xlabel("layers, that with the smallest delta for its quantisation error first")
    shares.legend()
    shares.grid(alpha=0.25)
    save_figure(figure, path)


# ---------------------------------------------------------------- the model card


def write_merged_card(
    folder: Path, report: Report, told: ForHub | None = None, file: str | None = None
) -> None:
    """Write the model card of a merged model.

    Args:
        folder: the folder of the model.
        report: the merge report, whose figures of the written model a hub is told as well.
        told: licence and data sets.
        file: the name of the GGUF file; None of a model in safetensors.

    Raises:
        StorageError: the card could not be written.
    """
    quantization = report["quantization"]
    kind = f", {quantization['quant_type']}" if quantization["bits"] == 4 else ""
    facts = (
        ("base", base_name(report["base"])),
        ("adapter", report["adapter"]),
        ("trained on", f"{quantization['bits']} bits{kind}"),
        ("merged", written_as(report)),
    )
    written = [each for each in report["variants"] if each["variant"] == "written"]
    told = replace(
        told or ForHub(),
        metrics={key: each[key] for each in written for key in ("loss", "mean_kl")},
        measured_on=report["rows"] or "",
    )
    write_rendered_card(
        folder,
        "merged_card.md.jinja",
        report["base"],
        "transformers" if file is None else "gguf",
        "merged",
        told=told,
        report=report,
        facts=facts,
        variants=[_cells(each, report) for each in report["variants"]],
        layers=layer_rows(report, _MOST_LAYERS),
        picture=PICTURE,
        file=file,
        forms=form_cells(report),
    )


def form_cells(report: Report) -> list[tuple[str, ...]]:
    """Return a row of a card for each written form."""
    return [
        (
            each["form"],
            f"{each['tensors']:,}",
            f"{each['relative_error']:.2g}",
            f"{each['largest_error']:.2g}",
            each["reader"],
        )
        for each in report["forms"]
    ]


def write_adapter_card(folder: Path, report: Report, file: str) -> None:
    """Write the card of an adapter in GGUF.

    Raises:
        StorageError: the card could not be written.
    """
    facts = (("base", base_name(report["base"])), ("adapter", report["adapter"]))
    write_rendered_card(
        folder,
        "gguf_adapter_card.md.jinja",
        report["base"],
        "gguf",
        "lora",
        report=report,
        facts=facts,
        forms=form_cells(report),
        file=file,
    )


def _cells(variant: Mapping[str, Any], report: Report) -> tuple[str, ...]:
    how = f" {written_as(report)}" if variant["variant"] == "written" else ""
    return (
        f"{_NAMES[variant['variant']]}{how}",
        f"{variant['loss']:.4f}",
        f"{variant['mean_kl']:.2g}",
        f"{variant['max_kl']:.2g}",
        f"{variant['top1_agreement']:.2%}",
        f"{variant['logit_error']:.2g}",
    )
