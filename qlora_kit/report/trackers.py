"""The metrics of a run, for TensorBoard or Weights & Biases, through accelerate's trackers.

Takes events, as the log does, and passes on numbers under the names that peers' dashboards use.
Settings are redacted; text of the data never gets here. A tracker that fails while the run goes is
dropped with a notice, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit.config import TrainConfig
from qlora_kit.errors import DataError, EnvironmentFault, first_line, raised_as
from qlora_kit.events import Announce, Evaluated, Event, Notice, StepFinished, StepSkipped
from qlora_kit.redact import redacted_values
from qlora_kit.report.log import is_logged
from qlora_kit.report.source_losses import SourceLosses
from qlora_kit.storage import read_json, write_json

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

Name = Literal["none", "tensorboard", "wandb"]

WANDB_RUN = "wandb.json"
_PROJECT = "qlora-kit"
_EITHER_OF = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
_REMEDY = {
    "tensorboard": "look at the package tensorboard",
    "wandb": "run `wandb login`, or set WANDB_MODE=offline",
}
# W&B would also send the printed lines, the command line, and the state of the git repository that
# the run is started in. Nobody asked for these, and each may hold a secret.
_ONLY_METRICS = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
}


def check_tracker(name: Name) -> None:
    """Check that the package of a tracker is installed, without importing it.

    Raises:
        EnvironmentFault: the package is not installed.
    """
    packages = _EITHER_OF.get(name, ())
    if packages and not any(map(_is_installed, packages)):
        raise EnvironmentFault(
            f"--report-to {name}: the package {packages[0]} is not installed; expected it; pip "
            "install 'qlora-kit[tracking]', or leave --report-to out"
        )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class Tracking:
    """Passes metrics to a tracker; a context manager, so that the tracker is always finished.

    Args:
        config: the configuration of the run; `report_to` names the tracker, or none.
        output: the run's folder, where the files of TensorBoard and W&B go too.
        first_step: the optimiser step that the run begins with; a resumed run's is above 1.
        announce: receives the place of the metrics, and a notice if the tracker fails.
    """

    def __init__(
        self, config: TrainConfig, output: Path, first_step: int, announce: Announce
    ) -> None:
        self._config = config
        self._output = output
        self._first_step = first_step
        self._announce = announce
        self._tracker: GeneralTracker | None = None
        self._sources = SourceLosses()

    def __enter__(self) -> Tracking:
        """Start the tracker.

        Raises:
            EnvironmentFault: the tracker does not start.
        """
        name = self._config.report_to
        if name == "none":
            return self
        with raised_as(
            EnvironmentFault,
            lambda error: (
                f"--report-to {name}: it does not start ({type(error).__name__}: "
                f"{first_line(error)}); expected it to; {_REMEDY[name]}, or leave --report-to out"
            ),
        ):
            tracker = self._tensorboard() if name == "tensorboard" else self._wandb()
            tracker.start()
            if self._first_step == 1:
                tracker.store_init_configuration(settings_of(self._config))
        self._tracker = tracker
        self._say_where(name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        try:
            tracker.finish()
        except Exception as fault:
            self._say_failed(fault)

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if self._tracker is None:
            return
        if isinstance(event, StepFinished):
            self._sources.add(event)
        found = metrics_of(event, self._config, self._sources)
        if found is None:
            return
        step, metrics = found
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        try:
            self._tracker.log(finite, step=step)
        except Exception as error:
            self._tracker = None
            self._say_failed(error)

    # ------------------------------------------------------------ the trackers

    def _tensorboard(self) -> GeneralTracker:
        from accelerate.tracking import TensorBoardTracker

        # The steps that a resumed run takes again replace the steps that TensorBoard has of it.
        again = {"purge_step": self._first_step} if self._first_step > 1 else {}
        return TensorBoardTracker("tensorboard", self._output, **again)

    def _wandb(self) -> GeneralTracker:
        from accelerate.tracking import WandBTracker

        return WandBTracker(
            os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", self._output.name),
            dir=os.environ.get("WANDB_DIR", str(self._output)),
            id=self._wandb_id(),
            resume="allow",
            settings=dict(_ONLY_METRICS),
        )

    def _wandb_id(self) -> str:
        """Return the id of this run in W&B; a resumed run has the same id."""
        path = self._output / WANDB_RUN
        try:
            stored = str(read_json(path)["id"])
        except (DataError, KeyError, TypeError):
            stored = uuid.uuid4().hex[:16]
            write_json(path, {"id": stored})
        return stored

    # ------------------------------------------------------------ notices

    def _say_where(self, name: str) -> None:
        if name == "tensorboard":
            self._announce(Notice(f"metrics: {self._output / 'tensorboard'}, for TensorBoard"))
            return
        url = getattr(getattr(self._tracker, "run", None), "url", None)
        self._announce(Notice(f"metrics: {url or f'{self._output}, for `wandb sync`'}"))

    def _say_failed(self, error: Exception) -> None:
        name = self._config.report_to
        self._announce(
            Notice(
                f"{name} has failed ({type(error).__name__}) and gets nothing more; the run goes "
                "on, and its log has everything"
            )
        )


def metrics_of(
    event: Event, config: TrainConfig, sources: SourceLosses | None = None
) -> tuple[int, Mapping[str, float]] | None:
    """Return an event's step and metrics; None for an event without metrics.

    Args:
        event: of a run.
        config: the options of the run.
        sources: the losses of each of several sources since the last step with metrics.
    """
    if isinstance(event, StepFinished):
        if not is_logged(event.optimizer_step, config.logging_steps):
            return None
        means = sources.told() if sources else {}
        weighted = {} if event.loss_weight is None else {"train/loss_weight": event.loss_weight}
        return event.optimizer_step, {
            "train/loss": event.loss,
            **{f"train/loss_{name}": mean for name, mean in means.items()},
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/epoch": event.epoch,
            "train/tokens_per_second": event.tokens / max(event.step_seconds, 1e-9),
            f"train/{event.weighs}": event.weight,
            **weighted,
            **{f"train/{name}": value for name, value in event.metrics.items()},
            "train/memory_bytes": event.memory_bytes,
        }
    if isinstance(event, StepSkipped):
        return event.optimizer_step, {"train/skipped": 1}
    if isinstance(event, Evaluated):
        metrics = {f"eval/{name}": value for name, value in event.metrics.items()}
        own = {"eval/loss": event.loss, "eval/seconds": event.seconds}
        return event.optimizer_step, {**own, **metrics}
    return None


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return every option in a form that trackers take: a text or a number, without secrets."""
    values = redacted_values(config.model_dump(mode="json"))
    return {name: _as_setting(value) for name, value in values.items()}


def _as_setting(value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        return ",".join(f"{name}={number}" for name, number in value.items())
    return "none" if value is None else str(value)
