"""Verifies a merge: compares the written model with the adapter on its quantised base.

Takes a merge and its folder; returns a `MergeReport`, or refuses the folder. Every written tensor
is compared with its expected values, up to the rounding of its dtype. The variants of the model
run on the same rows side by side, in fp32 and layer by layer, so a model larger than memory can be
verified.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.config import pinned_name
from qlora_kit.data.encode import IGNORED
from qlora_kit.errors import VerificationError
from qlora_kit.events import Announce, LoadProgress, silent
from qlora_kit.export.forms import Forms, Parameters, Stored, Variant, units_of
from qlora_kit.export.merge import Merge, untied_copies
from qlora_kit.export.merge_report import LayerChange, MergeReport, VariantMeasure, WrittenForm
from qlora_kit.export.rows import VerificationRows
from qlora_kit.export.streamed import StreamedModel
from qlora_kit.export.verdict import judge
from qlora_kit.layers.frozen import FrozenLinear
from qlora_kit.layers.head import Head
from qlora_kit.layers.head_terms import LowRankTerm
from qlora_kit.layers.merge_aware import hash_of_all, hash_of_codes
from qlora_kit.layers.weight import FrozenWeight, PlainWeight
from qlora_kit.lora.files import library_versions
from qlora_kit.model.hardware import dtype_name
from qlora_kit.model.head import head_of
from qlora_kit.model.memory import memory_returned, out_of_memory_while
from qlora_kit.signals import safe_point

_CHUNK_TOKENS = 128
_SLICE_ROWS = 8192
_MOST_FAULTS = 5
_MOSTLY = 0.5
_SAFETENSORS = version("safetensors")
# Predicted numbers that agree are this close.
_CLOSE = 0.01


@torch.no_grad()
def verify_merge(
    merge: Merge,
    folder: Path,
    rows: VerificationRows | None = None,
    announce: Announce = silent,
) -> MergeReport:
    """Compare a merged model with the trained one, tensor by tensor and on rows.

    Args:
        merge: the merge.
        folder: the folder of the merged model.
        rows: the rows that the variants are run on; if None, only weights are compared.
        announce: receives the progress.

    Raises:
        VerificationError: a tensor has other values than expected, is missing or surplus; or
            rounding to the dtype takes away most of the delta. The error names the layers.
        OutOfMemory: a layer does not fit in memory.
    """
    skeleton = merge.spec.skeleton()
    parameters = Parameters(merge, skeleton, folder)
    _check_tensor_names(parameters, skeleton, folder)
    weigher = _Weigher(merge, folder)
    variants = _variants(merge, parameters)
    for copy, source in untied_copies(merge.stored, skeleton).items():
        stored = _found(parameters.stored(source))
        weigher.weigh(Forms(copy, merge, stored, None, parameters.written(copy)))
    output = skeleton.get_output_embeddings()
    head_path = None if output is None else _path_of_module(skeleton, output)
    units = units_of(skeleton, output)
    done = 0

    def read(path: str) -> Sequence[Forms]:
        nonlocal done
        safe_point()
        forms = list(parameters.under(path))
        for form in forms:
            weigher.weigh(form)
        done += 1
        announce(LoadProgress(done, len(units) + 1))
        return forms

    remedy = "pass --device cpu, or fewer --verify-tokens"
    with out_of_memory_while("verifying the merge", remedy), memory_returned():
        measures: tuple[VariantMeasure, ...] = ()
        if rows is None:
            for path in (*units, *([head_path] if head_path else [])):
                read(path)
            weigher.raise_faults()
        else:
            model = StreamedModel(skeleton, units, read, variants, merge.stored, merge.device)
            if head_path is None:
                logits = model.logits(rows.batch.inputs)
                weigher.raise_faults()
                measures = _measure_classes(logits, rows, merge)
            else:
                hidden = model.hidden_states(rows.batch)
                read(head_path)
                weigher.raise_faults()
                heads = _heads(skeleton, head_path, parameters, merge, variants)
                measures = _measure_variants(hidden, heads, rows)
    exact = weigher.codes_are_trained()
    layers = tuple(sorted(weigher.layers, key=partial(_place, merge)))
    return MergeReport(
        base=merge.spec.source.identity,
        adapter=_name(merge.stored.folder.resolve()),
        quantization=merge.spec.quantization,
        dequantization_dtype=dtype_name(merge.unpacked),
        dtype=merge.form,
        merged_over=merge.over,
        is_requantized=merge.requantize,
        rows=rows.source if rows else None,
        tokens=rows.batch.units if rows else 0,
        variants=measures,
        layers=layers,
        verdict=judge(merge, rows, measures, layers, codes_are_trained=exact),
        versions=library_versions(),
        codes_are_trained=exact,
        forms=(weigher.written_form(),),
    )


def _name(adapter: Path) -> str:
    """Return the name of an adapter's folder, or its repository and commit."""
    return pinned_name(adapter).removeprefix(f"{adapter.parent}/")


def _place(merge: Merge, layer: LayerChange) -> tuple[bool, float]:
    """Order layers by their ratio; experts that were never trained come last, if there are some."""
    is_untrained = not layer.delta and merge.stored.is_of_expert(layer.path)
    return is_untrained, -layer.ratio


def _variants(merge: Merge, parameters: Parameters) -> list[Variant]:
    """Return the variants that differ for this base, the reference first."""
    variants = [Variant.ADAPTER, Variant.BASE, Variant.QUANTIZED]
    if merge.spec.quantization.bits != 16:
        variants += [Variant.ORIGINAL] if parameters.has_original else []
        variants += [] if merge.requantize else [Variant.REQUANTIZED]
        variants += [Variant.PEFT_FORM] if merge.spec.start is not None else []
    return [*variants, Variant.WRITTEN]


def _path_of_module(model: nn.Module, wanted: nn.Module | None) -> str:
    paths = (str(path) for path, module in model.named_modules() if module is wanted)
    return next(paths)


# ---------------------------------------------------------------- weights


def _check_tensor_names(parameters: Parameters, skeleton: PreTrainedModel, folder: Path) -> None:
    tied = skeleton.all_tied_weights_keys or {}
    for what, names in zip(
        ("missing", "surplus"), parameters.missing_and_surplus(tied), strict=True
    ):
        if names:
            shown = ", ".join(names[:_MOST_FAULTS])
            raise VerificationError(
                f"{folder.name}: {what} tensors in the merged model ({len(names)}): {shown}; "
                "expected those of the base; export again"
            )


@dataclass
class _Weigher:
    """Compares each written tensor with its expected values, once; keeps the changes of layers."""

    merge: Merge
    folder: Path
    layers: list[LayerChange] = field(default_factory=list)
    codes: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    largest: float = 0.0
    error: float = 0.0
    size: float = 0.0

    def weigh(self, form: Forms) -> None:
        """Compare one parameter."""
        if form.written is None:
            return
        excess = self._weigh_layer(form) if form.frozen is not None else self._weigh_plain(form)
        if not excess <= 1.0:
            self.faults.append(
                f"{form.name}: what was written differs from what was merged by {excess:.3g} times "
                f"the rounding of {self.merge.form}; expected at most 1; export again"
            )

    def _weigh_plain(self, form: Forms) -> float:
        """Compare slice by slice, so that an embedding is never upcast as a whole."""
        written = form.plain(Variant.WRITTEN)
        whole = form.plain(Variant.BASE) if form.saved is None else form.saved
        if whole.shape != written.shape:
            return math.inf
        change = _PlainChange(form.path)
        largest = 0.0
        for start in range(0, len(written) if written.dim() else 1, _SLICE_ROWS):
            part = slice(start, start + _SLICE_ROWS)
            expected = form.plain(Variant.ADAPTER, part).to(written.device).float()
            own = form.plain(Variant.WRITTEN, part).float()
            largest = max(largest, self._compare(form.name, expected, own))
            if form.is_adapted:
                change.add(expected, own, self.merge.stored.delta(form.path, part).to(own.device))
        if form.is_adapted and math.isfinite(largest):
            self.layers.append(change.told(is_quantized=self.merge.spec.quantization.bits != 16))
        return largest

    def _weigh_layer(self, form: Forms) -> float:
        is_packed = self.merge.spec.quantization.bits != 16 and not form.stays_unpacked
        if form.is_adapted and is_packed:
            # Quantising takes the most memory, so it comes before any weight is unpacked.
            _ = form.packed_again
        base, delta, written = form.base(self.merge.over), form.delta, form.as_written()
        if self.merge.requantize:
            excess = self._compare(form.name, form.requantized(), written)
        else:
            if delta is None or form.is_trained_packed:
                merged = form.merged(self.merge.over)
            else:
                merged = base + delta
            excess = self._compare(form.name, merged, written)
            del merged
        if form.is_adapted and form.is_trained_packed and self.merge.requantize:
            # What a checkpoint cannot hold packed was trained as codes nevertheless.
            packed = form.written if isinstance(form.written, FrozenWeight) else form.packed_again
            self.codes[form.path] = hash_of_codes(packed)
        if delta is not None and math.isfinite(excess):
            self.layers.append(_change(form, base, delta, written))
        return excess

    def _compare(self, name: str, expected: Tensor, written: Tensor) -> float:
        """Return the largest difference in units of the rounding, and count it for the report."""
        if self.merge.file is not None:
            excess = self.merge.file.excess(name, expected, written)
        else:
            excess = _excess(expected, written, self.merge.dtype)
        self.names.add(name)
        self.largest = max(self.largest, excess)
        if math.isfinite(excess):
            self.error += float((written - expected).norm()) ** 2
            self.size += float(expected.norm()) ** 2
        return excess

    def written_form(self) -> WrittenForm:
        """Return what the report says of the files that were compared."""
        is_gguf = self.merge.file is not None
        bits = self.merge.spec.quantization.bits
        packed = f"safetensors {bits} bits" if self.merge.requantize else None
        return WrittenForm(
            form=self.merge.form if is_gguf else packed or f"safetensors {self.merge.form}",
            tensors=len(self.names),
            relative_error=math.sqrt(self.error / self.size) if self.size else 0.0,
            largest_error=self.largest,
            reader=self.merge.file.reader if self.merge.file else f"safetensors {_SAFETENSORS}",
        )

    def codes_are_trained(self) -> bool | None:
        """Whether the packed weights are, bit for bit, those that were trained merge-aware.

        None of an adapter that was trained otherwise, or is not written packed.
        """
        record = self.merge.stored.record
        if record is None or not self.codes:
            return None
        return hash_of_all(self.codes) == record.trained_codes

    def raise_faults(self) -> None:
        """Refuse the folder if a tensor has other values than expected, or the delta is gone.

        Raises:
            VerificationError: one line for each of the first faults.
        """
        if self.faults:
            raise VerificationError(*self.faults[:_MOST_FAULTS])
        kept = mean_kept(self.layers)
        if kept is not None and kept < _MOSTLY and not self.merge.requantize:
            least = min(self.layers, key=lambda layer: layer.kept)
            raise VerificationError(
                f"{least.path}: {least.kept:.0%} of its delta is left after rounding to "
                f"{self.merge.form} ({kept:.0%} over all layers); expected it to stay; pass "
                f"{self.merge.exact}"
            )


@dataclass
class _PlainChange:
    """How merging and writing changed an embedding or a head, summed slice by slice."""

    path: str
    square: float = 0.0
    along: float = 0.0
    of_base: float = 0.0

    def add(self, merged: Tensor, written: Tensor, delta: Tensor) -> None:
        """Count a slice, in fp32; its delta is a part of `merged`."""
        base = merged - delta
        self.square += float(delta.square().sum())
        self.along += float(((written - base) * delta).sum())
        self.of_base += float(base.square().sum())

    def told(self, *, is_quantized: bool) -> LayerChange:
        """Return what the report says: nothing of it was quantised, whatever the other layers."""
        kept = self.along / self.square if self.square else 1.0
        size, norm = math.sqrt(self.square), math.sqrt(self.of_base)
        error, again = (0.0, kept) if is_quantized else (None, None)
        return LayerChange(self.path, error, size, norm, kept, again)


def _excess(expected: Tensor, written: Tensor, dtype: torch.dtype) -> float:
    """Return the largest difference, in units of the largest rounding error of `dtype`."""
    if expected.shape != written.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    # Half a unit in the last place is allowed for the rounding, and half for fp32 arithmetic.
    limits = torch.finfo(dtype)
    slack = limits.smallest_normal * limits.eps
    slack += float(expected.abs().max()) * torch.finfo(torch.float32).eps
    allowed = expected.abs().mul_(limits.eps).add_(slack)
    return float((written - expected).abs_().div_(allowed).max().nan_to_num(nan=math.inf))


def _change(form: Forms, base: Tensor, delta: Tensor, written: Tensor) -> LayerChange:
    """Measure how quantising, merging and writing changed the weight of a layer."""
    merge = form.merge
    is_quantized = merge.spec.quantization.bits != 16
    kept = _kept_share(written.sub_(base), delta)
    requantized_kept = None
    if is_quantized:
        again = kept if merge.requantize else _kept_share(form.requantized().sub_(base), delta)
        requantized_kept = again
    trained = base if merge.over == "quantized" else form.base()
    error = None
    if is_quantized and isinstance(form.stored, Tensor):
        error = float(form.base("original").sub_(trained).norm())
    size = float(delta.norm())
    return LayerChange(form.path, error, size, float(trained.norm()), kept, requantized_kept)


def _kept_share(change: Tensor, delta: Tensor) -> float:
    """Return the share of a delta that a change contains, by projection; overwrites the change."""
    square = float(delta.square().sum())
    return 1.0 if square == 0 else float(change.mul_(delta).sum()) / square


def mean_kept(layers: Sequence[LayerChange]) -> float | None:
    """Return the share of the delta, over all layers, that was written; None without a delta."""
    total = sum(layer.delta**2 for layer in layers)
    if not total:
        return None
    return sum(layer.kept * layer.delta**2 for layer in layers) / total


# ---------------------------------------------------------------- rows


def _heads(
    skeleton: PreTrainedModel,
    path: str,
    parameters: Parameters,
    merge: Merge,
    variants: Sequence[Variant],
) -> dict[Variant, Head]:
    """Return the head of every variant; a tied head is the embedding of the same model."""
    module = skeleton.get_submodule(path)
    assert isinstance(module, nn.Linear)
    skeleton.set_submodule(path, FrozenLinear.of(module))
    name = f"{path}.weight"
    tied = skeleton.all_tied_weights_keys or {}
    embedding = tied.get(name, name)

    def stored_head() -> Stored:
        found = parameters.stored(name)
        return _found(parameters.stored(embedding) if found is None else found)

    def written_head() -> Stored:
        found = parameters.written(name)
        return _found(parameters.written(embedding) if found is None else found)

    of_base = stored_head()
    # A head that stays tied gets what the embedding does.
    changed = name if name not in tied or merge.stored.unties(name, embedding) else embedding
    saved = merge.stored.in_place_of(changed, of_base)
    of_adapter = of_base if saved is None else saved.to(merge.device)
    chosen: Mapping[Variant, Stored] = {Variant.BASE: of_base, Variant.WRITTEN: written_head()}
    heads = {}
    for variant in variants:
        linear, term = FrozenLinear.of(module), None
        weight = chosen.get(variant, of_adapter)
        if path in merge.stored.tensors and variant is Variant.ADAPTER:
            a, b = (each.to(merge.device) for each in merge.stored.tensors[path])
            term = LowRankTerm(a, b, merge.stored.scaling_of(path))
        elif path in merge.stored.tensors and variant not in chosen:
            weight = Forms(name, merge, weight, None, None).plain(variant)
        linear.weight = weight if isinstance(weight, FrozenWeight) else PlainWeight(weight)
        if module.bias is not None:
            bias = parameters.stored(f"{path}.bias")
            if variant is Variant.WRITTEN:
                bias = parameters.written(f"{path}.bias")
            elif variant is not Variant.BASE:
                bias = merge.stored.saved.get(f"{path}.bias", bias)
            linear.bias = bias.to(merge.device) if isinstance(bias, Tensor) else None
        skeleton.set_submodule(path, linear)
        heads[variant] = replace(head_of(skeleton), term=term)
    return heads


def _found(weight: Stored | None) -> Stored:
    assert weight is not None, "names were compared before"
    return weight


def _measure_variants(
    hidden: Mapping[Variant, Tensor], heads: Mapping[Variant, Head], rows: VerificationRows
) -> tuple[VariantMeasure, ...]:
    """Compare the predictions of every variant with the adapter's, at the supervised tokens."""
    device = next(iter(hidden.values())).device
    positions = rows.batch.positions.to(device)
    targets = rows.batch.targets.to(device)
    states = {v: h.flatten(0, 1).index_select(0, positions) for v, h in hidden.items()}
    tallies = {variant: _Tally() for variant in hidden}
    for start in range(0, len(targets), _CHUNK_TOKENS):
        part = slice(start, start + _CHUNK_TOKENS)
        reference = heads[Variant.ADAPTER].logits(states[Variant.ADAPTER][part])
        for variant, tally in tallies.items():
            is_reference = variant is Variant.ADAPTER
            logits = reference if is_reference else heads[variant].logits(states[variant][part])
            tally.add(logits, reference, targets[part])
    losses = torch.cat(tallies[Variant.ADAPTER].losses)
    return tuple(tally.measure(variant, losses) for variant, tally in tallies.items())


def _measure_classes(
    logits: Mapping[Variant, Tensor], rows: VerificationRows, merge: Merge
) -> tuple[VariantMeasure, ...]:
    """Compare the logits of every variant of a classifier with the adapter's.

    They are (B, K), or (B, T, K) where words are tagged.
    """
    assert merge.spec.classes is not None
    kind = merge.spec.classes.kind
    targets = rows.batch.targets.to(logits[Variant.ADAPTER].device)
    if kind == "tags":
        is_word = targets != IGNORED
        logits = {variant: found[is_word] for variant, found in logits.items()}
        kind, targets = "single", targets[is_word]
    reference = logits[Variant.ADAPTER]
    if not rows.of_task:
        # Without labels the adapter's own answers are what the others are measured by.
        targets = None
    tallies = {variant: _Tally() for variant in logits}
    for variant, tally in tallies.items():
        found = logits[variant]
        if kind == "single":
            wanted = reference.argmax(1) if targets is None else targets
            tally.add(found, reference, wanted)
        elif kind == "multi":
            wanted = reference > 0 if targets is None else targets > 0
            tally.add(_yes_or_no(found), _yes_or_no(reference), wanted.flatten().long())
        else:
            numbers = reference.squeeze(1) if targets is None else targets
            tally.add_numbers(found.squeeze(1), reference.squeeze(1), numbers)
    losses = torch.cat(tallies[Variant.ADAPTER].losses)
    return tuple(tally.measure(variant, losses) for variant, tally in tallies.items())


def _yes_or_no(logits: Tensor) -> Tensor:
    """Return the logits (B, K) of several labels as a choice of two for each, (B · K, 2)."""
    flat = logits.flatten().unsqueeze(1)
    return torch.cat([torch.zeros_like(flat), flat], 1)


@dataclass
class _Tally:
    """Sums over the tokens, for one variant."""

    losses: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)
    agreements: int = 0
    error: float = 0.0
    size: float = 0.0

    def add(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        """Count a chunk: logits (n, V) of the variant and of the reference, targets (n,)."""
        logprobs, expected = logits.log_softmax(-1), reference.log_softmax(-1)
        self.losses.append(-logprobs.gather(1, targets.unsqueeze(1)).squeeze(1).double().cpu())
        divergence = (expected.exp() * (expected - logprobs)).sum(-1)
        self.divergences.append(divergence.clamp_min_(0).double().cpu())
        self.agreements += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        self.error += float((logits - reference).double().square().sum())
        self.size += float(reference.double().square().sum())

    def add_numbers(self, numbers: Tensor, reference: Tensor, targets: Tensor) -> None:
        """Count predicted numbers (n,), taken for means of normal distributions of variance 1."""
        self.losses.append((numbers - targets).square().double().cpu())
        self.divergences.append((numbers - reference).square().div(2).double().cpu())
        close = torch.isclose(numbers, reference, rtol=_CLOSE, atol=_CLOSE)
        self.agreements += int(close.sum())
        self.error += float((numbers - reference).double().square().sum())
        self.size += float(reference.double().square().sum())

    def measure(self, variant: Variant, reference_losses: Tensor) -> VariantMeasure:
        """Return the means."""
        losses, divergences = torch.cat(self.losses), torch.cat(self.divergences)
        difference = losses - reference_losses
        count = len(losses)
        spread = float(difference.std()) / math.sqrt(count) if count > 1 else math.inf
        return VariantMeasure(
            variant=variant.value,
            loss=float(losses.mean()),
            loss_change=float(difference.mean()),
            loss_change_error=spread,
            mean_kl=float(divergences.mean()),
            max_kl=float(divergences.max()),
            top1_agreement=self.agreements / count,
            logit_error=math.sqrt(self.error / self.size) if self.size else 0.0,
        )
