"""qlora-kit: fine-tune large language models on small GPUs.

The base is frozen in 4 or 8 bits, small LoRA matrices are trained on it, and the result
leaves as a PEFT adapter or as a merged fp16 model. Everything the commands do can be imported:

    import qlora_kit as qk

    opened = qk.open_base(qk.BaseModelOptions(model="demo", bits=4))
    adapter = qk.attach(opened.base, qk.LoraSpec(rank=16, targets=("all-linear",)))
    data = qk.load_data("my.jsonl", opened.tokenizer, qk.TokenOptions(max_length=512))
    qk.train_adapter(adapter, data.rows, qk.TrainConfig(max_steps=100))
    record = qk.BaseRecord.of(opened.base, template_hash=data.template_hash)
    qk.save_adapter(adapter, folder, record)

A name is loaded when it is first used, so importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_kit.config import (
        BaseModelOptions,
        EvaluateConfig,
        ExportConfig,
        GenerateConfig,
        RecordOptions,
        TokenOptions,
        TrainConfig,
    )
    from qlora_kit.errors import QloraKitError
    from qlora_kit.export.merge import merge_to
    from qlora_kit.export.quantized import quantize_to
    from qlora_kit.export.verify import verify_merge
    from qlora_kit.infer.evaluate import evaluate
    from qlora_kit.infer.generate import Sampling, generate
    from qlora_kit.layers.quantize import Quantization
    from qlora_kit.lora.adapter import load_adapter
    from qlora_kit.lora.attach import Adapter, attach, detach, merge
    from qlora_kit.lora.files import BaseRecord
    from qlora_kit.lora.reading import read_adapter
    from qlora_kit.lora.several import AdapterSet, PerRow, load_adapters
    from qlora_kit.lora.spec import LoraSpec, Variant
    from qlora_kit.lora.writing import save_adapter
    from qlora_kit.model.hardware import choose_hardware
    from qlora_kit.model.load import Base, BaseSpec, load_base
    from qlora_kit.model.names import find_model, known_models
    from qlora_kit.opening.labelled import open_classifier
    from qlora_kit.opening.model import load_data, open_base
    from qlora_kit.opening.options import configure
    from qlora_kit.parallel.sharded import load_shared_base
    from qlora_kit.train.loop import TrainResult, train_adapter

__version__ = "0.1.0"

_EXPORTS = {
    "config": (
        "BaseModelOptions",
        "EvaluateConfig",
        "ExportConfig",
        "GenerateConfig",
        "RecordOptions",
        "TokenOptions",
        "TrainConfig",
    ),
    "errors": ("QloraKitError",),
    "export.merge": ("merge_to",),
    "export.quantized": ("quantize_to",),
    "export.verify": ("verify_merge",),
    "infer.evaluate": ("evaluate",),
    "infer.generate": ("Sampling", "generate"),
    "lora.adapter": ("load_adapter",),
    "lora.attach": ("Adapter", "attach", "detach", "merge"),
    "lora.spec": ("LoraSpec", "Variant"),
    "lora.writing": ("save_adapter",),
    "lora.files": ("BaseRecord",),
    "lora.reading": ("read_adapter",),
    "lora.several": ("AdapterSet", "PerRow", "load_adapters"),
    "model.hardware": ("choose_hardware",),
    "model.load": ("Base", "BaseSpec", "load_base"),
    "model.names": ("find_model", "known_models"),
    "layers.quantize": ("Quantization",),
    "opening.labelled": ("open_classifier",),
    "opening.model": ("load_data", "open_base"),
    "opening.options": ("configure",),
    "parallel.sharded": ("load_shared_base",),
    "train.loop": ("TrainResult", "train_adapter"),
}
_HOME_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted([*_HOME_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'qlora_kit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qlora_kit.{_HOME_OF[name]}"), name)
