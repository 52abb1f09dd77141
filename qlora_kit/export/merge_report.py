"""The records that verifying a merge makes: the content of `merge_report.json`.

`verify` makes them, `verdict` judges them, `report/` shows them. Nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qlora_kit.errors import VerificationError
from qlora_kit.layers.quantize import Quantization

NAME = "merge_report.json"
_FORMAT = 1


@dataclass(frozen=True)
class VariantMeasure:
    """A variant of the model, compared with the adapter on its quantised base, both in fp32.

    Attributes:
        variant: the variant, see `forms.Variant`.
        loss: loss of the variant, nats per supervised token.
        loss_change: difference of the loss from the adapter's, nats per token.
        loss_change_error: standard error of `loss_change`, over the tokens.
        mean_kl: KL divergence of the adapter's predictions from the variant's, nats per token.
        max_kl: KL divergence at the worst token, nats.
        top1_agreement: share of tokens at which both models prefer the same token.
        logit_error: norm of the difference of the logits, relative to the norm of the adapter's.
    """

    variant: str
    loss: float
    loss_change: float
    loss_change_error: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    logit_error: float


@dataclass(frozen=True)
class LayerChange:
    """What became of the weight W of an adapted layer; norms are Frobenius norms.

    Attributes:
        path: the path of the layer.
        quantization_error: norm of the difference between W and the weight that training used;
            None where the base is not quantised, or has no unquantised weights.
        delta: norm of the adapter's delta.
        weight: norm of the weight that training used.
        kept: share of the delta that is in the written weight, by projection onto the delta.
        requantized_kept: the same share after quantising the merged weight again, or None.
    """

    path: str
    quantization_error: float | None
    delta: float
    weight: float
    kept: float
    requantized_kept: float | None

    @property
    def ratio(self) -> float:
        """The ratio of the quantisation error to the delta."""
        if self.quantization_error is None:
            return 0.0
        return self.quantization_error / self.delta if self.delta else math.inf


@dataclass(frozen=True)
class WrittenForm:
    """Files of an export, read again and compared with what was to be written.

    Attributes:
        form: the form in words, such as "safetensors float16" or "gguf q8_0".
        tensors: number of parameters that were compared.
        relative_error: norm of the difference of all parameters, relative to their norm.
        largest_error: the largest difference of a value, in units of the largest error that
            rounding to the type allows; at most 1.
        reader: the library that read the files.
    """

    form: str
    tensors: int
    relative_error: float
    largest_error: float
    reader: str


@dataclass(frozen=True)
class Verdict:
    """The verdict on a merge, from its measurements.

    Attributes:
        merge_into: the base that this adapter should be merged into.
        requantizing: whether quantising the merged weights again keeps the delta; None where
            the base is not quantised.
        text: the same in words: sentences with the numbers that decided.
    """

    merge_into: Literal["quantized", "original"]
    requantizing: Literal["keeps", "loses"] | None
    text: tuple[str, ...]


@dataclass(frozen=True)
class MergeReport:
    """The report of a verified merge.

    Attributes:
        base: name of the base.
        adapter: name of the adapter's folder.
        quantization: quantisation of the base in training.
        dequantization_dtype: dtype that training unpacked weights to.
        dtype: dtype of the written weights, or the type of a GGUF file.
        merged_over: "quantized" or "original".
        is_requantized: whether the merged weights were quantised again.
        rows: the rows that the variants ran on, in words; None if they did not run.
        tokens: number of supervised tokens in these rows.
        variants: the measurements of the variants.
        layers: the adapted layers, the layer with the largest ratio first.
        verdict: the verdict on the merge.
        versions: versions of the libraries that computed it.
        codes_are_trained: whether the written codes are, bit for bit, those that were trained
            merge-aware; None of other merges.
        forms: what was written, as measured by reading it back.
    """

    base: str
    adapter: str
    quantization: Quantization
    dequantization_dtype: str
    dtype: str
    merged_over: str
    is_requantized: bool
    rows: str | None
    tokens: int
    variants: tuple[VariantMeasure, ...]
    layers: tuple[LayerChange, ...]
    verdict: Verdict
    versions: Mapping[str, str]
    codes_are_trained: bool | None = None
    forms: tuple[WrittenForm, ...] = ()

    def variant(self, name: str) -> VariantMeasure | None:
        """Return the measurement of a variant, or None where there is none."""
        return next((each for each in self.variants if each.variant == name), None)

    def as_json(self) -> dict[str, Any]:
        """Return the content of `merge_report.json`; the ratio to a delta of zero is null."""
        ratios = [layer.ratio if math.isfinite(layer.ratio) else None for layer in self.layers]
        layers = [
            {**asdict(layer), "ratio": ratio if layer.quantization_error is not None else None}
            for layer, ratio in zip(self.layers, ratios, strict=True)
        ]
        content = {"format": _FORMAT, **asdict(self), "layers": layers}
        if self.codes_are_trained is None:
            del content["codes_are_trained"]
        return {key: _without_infinity(value) for key, value in content.items()}


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_threshold(report: MergeReport, threshold: float | None) -> None:
    """Refuse a merge whose predictions differ more from the adapter's than is allowed.

    Args:
        report: the report of the merge.
        threshold: largest mean KL divergence, nats per token; None allows any.

    Raises:
        VerificationError: the divergence is larger, or was not measured.
    """
    if threshold is None:
        return
    written = report.variant("written")
    if written is None:
        raise VerificationError(
            "--verify-threshold: nothing was measured; expected rows; pass --verify-tokens above 0"
        )
    if not written.mean_kl <= threshold:
        remedy = (
            "keep the adapter and its base" if report.is_requantized else "pass --dtype float32"
        )
        if report.dtype.startswith("gguf"):
            remedy = "pass --gguf-type f32"
        if report.merged_over == "original":
            remedy = "pass --base quantized"
        raise VerificationError(
            f"the merged model is {written.mean_kl:.3g} nats per token (mean KL) from the adapter "
            f"on its quantised base; expected at most {threshold:g}; {remedy}, or a larger "
            "--verify-threshold"
        )
