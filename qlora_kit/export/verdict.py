"""Judges a merge in words: the base to merge into, and whether to quantise again.

Takes measurements; returns a verdict whose sentences give the numbers that decided. Never measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qlora_kit.export.forms import Variant
from qlora_kit.export.merge import Merge
from qlora_kit.export.merge_report import LayerChange, VariantMeasure, Verdict
from qlora_kit.export.rows import VerificationRows

# A difference of less than two standard errors cannot be told from chance.
_ERRORS = 2.0
# Quantising again "keeps" a delta if at least half of the delta is left in the weights, and if at
# most half of the adapter's effect on the predictions is undone.
_HALF = 0.5


def judge(
    merge: Merge,
    rows: VerificationRows | None,
    measures: Sequence[VariantMeasure],
    layers: Sequence[LayerChange],
    *,
    codes_are_trained: bool | None = None,
) -> Verdict:
    """Return the base this adapter should be merged into, and whether it survives quantising again.

    Args:
        merge: the merge.
        rows: the rows that were measured on, or None.
        measures: measurements of the variants; empty if none were run.
        layers: the changes of the adapted layers.
        codes_are_trained: see `MergeReport`.
    """
    by_name = {measure.variant: measure for measure in measures}
    merge_into, why = _base(merge, rows, by_name)
    requantizing, how = _requantizing(merge, by_name, layers)
    if merge.is_merge_aware:
        requantizing, how = "keeps", _merge_aware(merge, by_name, codes_are_trained)
    texts = (why, how, _rounding(merge, layers), _untrained(merge, layers))
    return Verdict(merge_into, requantizing, tuple(text for text in texts if text))


def _base(
    merge: Merge, rows: VerificationRows | None, measures: dict[str, VariantMeasure]
) -> tuple[Literal["quantized", "original"], str]:
    if merge.spec.quantization.bits == 16:
        return (
            "quantized",
            "The base was not quantised in training: there is only one to merge into.",
        )
    trained = "Merge into the quantised base (--base quantized): it is what was trained"
    if merge.is_merge_aware:
        return "quantized", f"{trained}, and what its codes are made of."
    original = measures.get(Variant.ORIGINAL)
    if original is None or rows is None:
        reason = "not measured on rows" if rows is None else "there are no other weights"
        return "quantized", f"{trained}; {reason}."
    change, error = original.loss_change, original.loss_change_error
    numbers = (
        f"{change:+.4f} ± {error:.4f} nats per token, mean KL {original.mean_kl:.3g}, on "
        f"{rows.source}"
    )
    if not rows.of_task:
        return "quantized", (
            f"{trained}. The original base changes the loss by {numbers}; whether that is better "
            "only rows of the task can tell (--data FILE)."
        )
    if change < -_ERRORS * error:
        return "original", (
            f"Merge into the original base (--base original): the loss changes by {numbers}, "
            "more than chance."
        )
    verdict = "is worse" if change > _ERRORS * error else "makes no difference that can be told"
    return "quantized", f"{trained}. The original base {verdict}: {numbers}."


def _requantizing(
    merge: Merge, measures: dict[str, VariantMeasure], layers: Sequence[LayerChange]
) -> tuple[Literal["keeps", "loses"] | None, str]:
    kept = _share(layers)
    if kept is None:
        return None, ""
    again = measures.get(Variant.WRITTEN if merge.requantize else Variant.REQUANTIZED)
    without = measures.get(Variant.BASE)
    undone, numbers = 0.0, f"{kept:.0%} of the delta stays in the weights"
    if again is not None and without is not None and without.mean_kl > 0:
        undone = again.mean_kl / without.mean_kl
        numbers += (
            f", mean KL {again.mean_kl:.3g} against {without.mean_kl:.3g} without the adapter, "
            f"loss {again.loss_change:+.4f} ± {again.loss_change_error:.4f}"
        )
    bits = merge.spec.quantization.bits
    if kept >= _HALF and undone <= _HALF:
        return (
            "keeps",
            f"Quantising the merged weights to {bits} bits again keeps most of it: {numbers}.",
        )
    return "loses", (
        f"Do not quantise the merged weights to {bits} bits again: it loses what was trained: "
        f"{numbers}. Serve the adapter on its base instead."
    )


def _merge_aware(
    merge: Merge, measures: dict[str, VariantMeasure], codes_are_trained: bool | None
) -> str:
    """Say what is written of an adapter that was trained as packed weights."""
    said = f"It was trained merge-aware, as weights in {merge.spec.quantization.bits} bits"
    if codes_are_trained is None:
        said += ": --requantize writes these; what is written here is their values"
    elif codes_are_trained:
        said += ", and the codes that are written are those that were trained, bit for bit"
    else:
        said += (
            ", and the codes that are written are others in places: export on the kind of device "
            "that trained it to have them bit for bit"
        )
    named = (Variant.BASE, Variant.ADAPTER, Variant.WRITTEN)
    if all(name in measures for name in named):
        base, trained, written = (measures[name].loss for name in named)
        if trained < base:
            share = (base - written) / (base - trained)
            said += (
                f". They recover {share:.2%} of what training gained: loss {base:.4f} before, "
                f"{trained:.4f} trained, {written:.4f} written"
            )
    return f"{said}."


def _share(layers: Sequence[LayerChange]) -> float | None:
    """Return the share of the delta, over all layers, that is left after quantising again."""
    measured = [layer for layer in layers if layer.requantized_kept is not None]
    total = sum(layer.delta**2 for layer in measured)
    if not total:
        return None
    return sum((layer.requantized_kept or 0.0) * layer.delta**2 for layer in measured) / total


def _rounding(merge: Merge, layers: Sequence[LayerChange]) -> str:
    lost = [layer for layer in layers if layer.delta and layer.kept < _HALF]
    if merge.requantize or not lost:
        return ""
    return (
        f"Rounding takes most of the delta of {len(lost)} of {len(layers)} layers away, such as "
        f"{lost[0].path} ({lost[0].kept:.0%} kept): {merge.exact} keeps it."
    )


def _untrained(merge: Merge, layers: Sequence[LayerChange]) -> str:
    experts = [layer for layer in layers if merge.stored.is_of_expert(layer.path)]
    idle = [layer for layer in experts if not layer.delta]
    if not idle:
        return ""
    return (
        f"{len(idle):,} of {len(experts):,} layers of experts have no delta, such as "
        f"{idle[0].path}: no token of the training chose them."
    )
