"""The options of a command: those that the user gives, over those of the model and of the run.

Takes layers of values; returns a configuration. Never opens a model. An adapter that is named by
its hub id is fetched, and the configuration has its folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_kit.config import AnyConfig, Layer, Options, SweepConfig, TrainConfig, resolve
from qlora_kit.model.names import find_model, known_models
from qlora_kit.opening.adapters import folder_of_adapter
from qlora_kit.opening.start import options_of_start
from qlora_kit.train.folder import stored_layer
from qlora_kit.train.sweep_folder import stored_sweep


def configure(
    config_class: type[AnyConfig], layers: Sequence[Layer] = (), **given: Any
) -> AnyConfig:
    """Resolve a configuration from all its sources; each source overrides those to its left.

        defaults  <  configs/NAME.yaml  <  the adapter that training starts from
                  <  the run that is resumed  <  `layers`  <  `given`

    The options of a sweep are those that were given: what the model's file changes is asked anew
    for each trial, which may have another model.

    The class alone, as in `TrainConfig(model="smollm2-135m")`, knows the defaults only.

    Args:
        config_class: the configuration of a command.
        layers: values of other sources, such as `config.read_config_file`.
        given: values by the name of their option, or by a synonym of it.

    Raises:
        ConfigError: the values have faults; the error lists all of them, see `config.resolve`.
        ModelError: there is no such model.
        AdapterError: there is no such adapter to start from, or none of that name on the hub.
        HubError: an adapter is on the hub, which is out of reach.
    """
    layers = [*layers, Layer("", given)]
    asked = resolve(config_class, layers)
    if here := _fetched(asked):
        layers.append(Layer("", here))
        asked = resolve(config_class, layers)
    if isinstance(asked, TrainConfig) and (stored := _stored_options(asked)):
        layers.insert(0, stored)
        asked = resolve(config_class, layers)
        if here := _fetched(asked):
            layers.append(Layer("", here))
            asked = resolve(config_class, layers)
    if not isinstance(asked, TrainConfig) or isinstance(asked, SweepConfig):
        return asked
    if asked.adapter is not None:
        named = asked.model if "model" in asked.model_fields_set else None
        layers.insert(0, Layer(str(asked.adapter), options_of_start(asked.adapter, named)))
        asked = resolve(config_class, layers)
    assert isinstance(asked, TrainConfig)
    source = find_model(asked.model)
    origin = f"configs/{source.name}.yaml" if source.name in known_models() else source.name
    return resolve(config_class, [Layer(origin, source.settings), *layers])


def _fetched(asked: Options) -> dict[str, Any]:
    """Return the options that name adapters by their hub id, with the folders of their files."""
    one, several = getattr(asked, "adapter", None), getattr(asked, "adapters", {})
    found: dict[str, Any] = {}
    if one is not None and (folder := folder_of_adapter(one)) != one:
        found["adapter"] = str(folder)
    if (folders := {name: folder_of_adapter(each) for name, each in several.items()}) != several:
        found["adapters"] = {name: str(folder) for name, folder in folders.items()}
    return found


def _stored_options(asked: TrainConfig) -> Layer | None:
    """Return the options of the run to resume, which the user's options override; or None."""
    if isinstance(asked, SweepConfig):
        return stored_sweep(asked.output, asked.resume)
    stored = stored_layer(asked.output, asked.resume)
    given = asked.model_fields_set
    if stored is not None and "epochs" in given and "max_steps" not in given:
        # A stored number of steps would silently win over the epochs that the user asked for.
        return Layer(stored.origin, {**stored.values, "max_steps": None})
    return stored
