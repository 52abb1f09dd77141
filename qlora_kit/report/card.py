"""The model card of an adapter: a README.md with what it was made of and how it did.

It goes where the adapter goes, so it holds no text of the data.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from qlora_kit.redact import redacted
from qlora_kit.report.facts import RunSummary
from qlora_kit.report.tables import markdown_table
from qlora_kit.storage import write_text

NAME = "README.md"

_WITH_PEFT = """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "this-folder"  # or the id of the repository that holds it
model = AutoPeftModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""


def write_card(folder: Path, summary: RunSummary) -> None:
    """Write the model card into a run folder."""
    data = ModelCardData(
        base_model=summary.base if _is_hub_id(summary.base) else None,
        library_name="peft",
        tags=["lora", "qlora", "qlora-kit"],
        pipeline_tag="text-generation",
    )
    name = summary.base_name
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# LoRA adapter for {name}",
        "Trained with qlora-kit: small LoRA matrices beside a frozen, quantised base. "
        f"It works with {name} only.",
        "## Use\n\n" + _WITH_PEFT,
        'Or `qlora-kit generate --adapter this-folder --prompt "..."`, and '
        "`qlora-kit export this-folder --to merged` for one model without adapter.",
        "## Training\n\n" + markdown_table(summary.facts),
        "## Results\n\n" + markdown_table(summary.results),
        "![loss](loss.png)",
        "## Settings\n\n" + markdown_table(summary.deciding),
        "## Versions\n\n" + markdown_table(summary.versions),
    ]
    card = ModelCard("\n\n".join(sections) + "\n").content
    write_text(folder / NAME, redacted(card))


def _is_hub_id(base: str) -> bool:
    return "/" in base and not base.startswith("/")
