"""Every option of the kit, and how values from many places become one configuration.

`options.py` declares the options, `decisions.py` says what each option decides, `values.py` reads
the values that people write, `over.py` what a sweep varies, `resolve.py` lays files and flags over
each other. Never imports torch, nor anything that imports it.
"""

from qlora_kit.config.decisions import GROUPS, by_heading, compared, declared, that_decide
from qlora_kit.config.options import (
    AdapterOption,
    BaseModelOptions,
    Bits,
    BudgetOptions,
    ChatConfig,
    CheckConfig,
    DataOptions,
    DataSource,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    GgufTypeName,
    LabelKind,
    LongSamples,
    LoraOptions,
    MetricName,
    OptimizerOptions,
    Options,
    PlanConfig,
    PreferenceLoss,
    QuantizeConfig,
    RecordOptions,
    RunOptions,
    RunsConfig,
    ServeConfig,
    StepOptions,
    SweepConfig,
    TaskOptions,
    TemplateOption,
    TokenOptions,
    TrainConfig,
    VariantOptions,
)
from qlora_kit.config.resolve import (
    SWITCHES,
    AnyConfig,
    Layer,
    did_you_mean,
    field_names,
    read_config_file,
    resolve,
)
from qlora_kit.config.values import parse_size, pinned_name

__all__ = [
    "GROUPS", "SWITCHES", "AdapterOption", "AnyConfig", "BaseModelOptions", "Bits", "BudgetOptions",
    "ChatConfig", "CheckConfig", "DataOptions", "DataSource", "EvaluateConfig", "ExportConfig",
    "GenerateConfig", "GgufTypeName",
    "LabelKind", "Layer", "LongSamples", "LoraOptions", "MetricName", "OptimizerOptions", "Options",
    "PlanConfig", "PreferenceLoss", "QuantizeConfig", "RecordOptions", "RunOptions", "RunsConfig",
    "ServeConfig", "StepOptions", "SweepConfig", "TaskOptions", "TemplateOption", "TokenOptions",
    "TrainConfig", "VariantOptions",
    "by_heading", "compared", "declared", "did_you_mean", "field_names", "parse_size",
    "pinned_name", "read_config_file", "resolve", "that_decide",
]  # fmt: skip
