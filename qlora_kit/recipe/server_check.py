"""Says whether a server would serve an adapter as it was trained, without the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_kit.errors import AdapterError
from qlora_kit.events import Announce, Closing, Facts, Notice
from qlora_kit.export.servers import SERVERS, ServerName, read_facts
from qlora_kit.lora.files import read_base_record


def check_for_server(
    adapter: Path, name: ServerName, model: str | None, announce: Announce
) -> dict[str, Any]:
    """Compare an adapter with the rules of a server, and show the command that serves it.

    Args:
        adapter: the folder of the adapter.
        name: the server.
        model: the base; None for the one that the adapter names.
        announce: receives what is found.

    Returns:
        What is found, for programs.

    Raises:
        AdapterError: the server would refuse it, or leave a part of it out; one line a reason.
    """
    facts, server = read_facts(adapter), SERVERS[name]
    if reasons := server.reasons(facts):
        remedy = f"`qlora-kit export {adapter} --to DIR` merges it into a model for every server"
        raise AdapterError(
            *(f"{adapter}: {server.title} {server.version}: {reason}" for reason in reasons[:-1]),
            f"{adapter}: {server.title} {server.version}: {reasons[-1]}; {remedy}",
        )
    record = read_base_record(adapter)
    base = model or (record.base if record else facts.fields.get("base_model_name_or_path"))
    command = server.command(facts, str(base or "BASE"), adapter.resolve().name)
    rows = (
        ("read in its loader", server.version),
        ("largest rank", str(facts.rank)),
        ("layers", ", ".join(facts.modules) or "not looked at"),
    )
    announce(Facts(f"{server.title} would serve this adapter as it was trained", rows))
    notes = [*server.notes(facts)]
    for note in notes:
        announce(Notice(note))
    announce(Closing((), (command,)))
    return {
        "server": name,
        "version": server.version,
        "accepted": True,
        "rank": facts.rank,
        "command": command,
        "notes": notes,
    }
