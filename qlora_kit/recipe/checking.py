"""Shows the data that training would learn from, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_kit.config import CheckConfig
from qlora_kit.errors import ConfigError
from qlora_kit.events import Announce, Closing, Facts, Notice, RowShown, silent
from qlora_kit.model.names import find_model
from qlora_kit.opening.tasks import check_loss
from qlora_kit.opening.variants import check_variants
from qlora_kit.recipe.rows import read_data, surveyed, token_rows
from qlora_kit.recipe.streaming import settled
from qlora_kit.storage import check_writable, write_text


def check(config: CheckConfig, announce: Announce = silent) -> dict[str, Any]:
    """Read and tokenise data as `train` does, and show the tokens that it would learn.

    Args:
        config: the data, the model, and the rows to show.
        announce: receives tables, rows and warnings.

    Returns:
        The survey of the data, for programs.
    """
    find_model(config.model)
    check_loss(config)
    check_variants(config)
    if config.html is not None:
        check_page(config.html)
    samples, validation = read_data(config, announce)
    config = settled(config, samples, validation, announce)

    from qlora_kit.report import data_view
    from qlora_kit.train.packing import choose_packing

    opened, rows, held_out = token_rows(samples, validation, config, announce)
    spec = opened.spec(config)
    longest = None if samples.stream is None else config.max_length
    packing = choose_packing(config, opened.task, spec.skeleton(), rows.rows, longest=longest)
    config = packing.settled(config)
    found = surveyed(samples, validation, rows, held_out, opened, config, config.rows, packing)
    for title, table in data_view.tables(found):
        announce(Facts(title, table))
    for row in found.shown:
        tokens = tuple((piece.text, piece.weight) for piece in row.pieces)
        announce(RowShown(data_view.shown_title(row), tokens))
    for warning in found.warnings():
        announce(Notice(warning))
    if config.html is not None:
        write_text(config.html, data_view.data_page(found))
        announce(Closing((str(config.html),), ()))
    return found.as_json()


def check_page(path: Path) -> None:
    """Check that a page can be written at `path`; it may replace an earlier page and nothing else.

    Raises:
        ConfigError: `path` names no page, or its folder does not exist.
    """
    if path.suffix not in (".html", ".htm") or path.is_dir():
        raise ConfigError(f"--html: found {path}; expected a name that ends in .html; correct it")
    if not path.parent.is_dir():
        raise ConfigError(f"--html: no folder {path.parent}; expected one; make it")
    check_writable(path.parent)
