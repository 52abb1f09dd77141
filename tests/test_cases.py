"""Small inputs that trip users of training tools, run with the users' own commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import run
from tiny_models import load_folder
from transformers import AutoModelForCausalLM

from qlora_kit.lora.adapter import load_adapter
from qlora_kit.lora.several import load_adapters

pytestmark = pytest.mark.usefixtures("simulated_once", "few_rows")

# For runs that are neither rehearsed nor looked at.
PLAIN = ("--no-rehearse", "--samples", "0")

Kit = Callable[..., tuple[int, str, str]]

IDS = [[1, 403, 407, 261, 378, 300, 50, 60, 70, 80]]


@pytest.fixture
def case(assets: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the folder of the case that the test is marked with."""
    source = assets / "cases" / request.param
    if not source.is_dir():
        pytest.skip(f"case {request.param} not found")
    copy = tmp_path / "case"
    copy.mkdir()
    for path in source.iterdir():
        # The originals may be read-only, and copied permissions would make the copies read-only.
        shutil.copyfile(path, copy / path.name)
    return copy


def of(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", names, indirect=True)


@pytest.fixture
def kit(case: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kit:
    """Return a function that runs a command inside of the case's folder."""
    monkeypatch.chdir(case)

    def command(*arguments: str) -> tuple[int, str, str]:
        code, out, err = run(*arguments, capsys=capsys)
        assert "internal error" not in err
        return code, out, err

    return command


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def merged_logits(case: Path, kit: Kit, stories: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the adapter of a case into the base as it is stored; return its logits, and PEFT's."""
    code, _, err = kit("export", ".", "--to", "out", "--model", str(stories), "--base",
                       "original", "--dtype", "float32")  # fmt: skip
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(case / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        found = merged(input_ids=torch.tensor(IDS)).logits
    return found, torch.load(case / "logits.pt", weights_only=True)


# ---------------------------------------------------------------- configurations


@of("yaml-resume-true")
def test_resume_true_is_the_latest(kit: Kit) -> None:
    code, _, err = kit("train", "--config", "c.yaml")
    assert code == 2
    assert err == "error: --resume: which run? name its folder with --output\n"
    for steps in ("1", "2"):
        arguments = ("--output", "run", "--max-steps", steps, *PLAIN)
        config = ("--config", "c.yaml") if steps == "2" else ()
        code, out, err = kit("train", *config, *arguments)
        assert code == 0, err
    assert "resuming from run/checkpoint-1" in out


@of("targets-regex-comma")
def test_a_pattern_with_a_comma_is_one_target(case: Path, kit: Kit, stories: Path) -> None:
    code, _, err = kit("train", "--config", "c.yaml", "--model", str(stories), "--data",
                         "tiny.jsonl", "--output", "out", "--max-steps", "1", *PLAIN)  # fmt: skip
    assert code == 0, err
    assert json.loads((case / "out/adapter_config.json").read_text())["target_modules"] == [
        "q_proj"
    ]


@of("targets-lm_head")
def test_the_head_is_a_target(case: Path, kit: Kit, stories: Path) -> None:
    code, _, err = kit("train", "--model", str(stories), "--data", "tiny.jsonl", "--output",
                       "out", "--targets", "q_proj,lm_head", "--max-steps", "1",
                       *PLAIN)  # fmt: skip
    assert code == 0, err
    config = json.loads((case / "out/adapter_config.json").read_text())
    assert config["target_modules"] == ["lm_head", "q_proj"]


@of("adapter-p_lmhead_lora", "adapter-p_lmhead_nobl")
def test_lora_on_a_tied_head_gives_the_logits_of_peft(case: Path, kit: Kit, stories: Path) -> None:
    """Merged, on the base, and as one of several adapters on it."""
    ids = torch.tensor(IDS)
    wanted = torch.load(case / "logits.pt")
    code, _, err = kit("export", ".", "--to", "out", "--model", str(stories), "--base", "original",
                       "--dtype", "float32")  # fmt: skip
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(case / "out", dtype=torch.float32)
    assert merged.config.tie_word_embeddings is False
    base = load_folder(stories)
    load_adapter(base, case)
    several = load_adapters(load_folder(stories), {"a": case})
    several.set_adapter("a")
    for model in (merged, base.model, several.base.model):
        with torch.no_grad():
            assert (model(ids).logits - wanted).abs().max() <= 1e-4


# ---------------------------------------------------------------- data


@of("assistant-first")
@pytest.mark.parametrize("template", [None, "chatml_s.jinja", "vicuna"])
@pytest.mark.parametrize("data", ["asstfirst.jsonl", "asstfirst_sg.jsonl", "asstfirst_sys.jsonl"])
def test_the_assistant_may_speak_first(
    kit: Kit, stories: Path, data: str, template: str | None
) -> None:
    chosen = ("--chat-template", template) if template else ()
    code, out, err = kit("check", "--model", str(stories), "--data", data, *chosen)
    assert code == 0, err
    assert "2 of 2 tried are what generation is given, token by token" in out
    space = " " if template == "vicuna" else ""
    shown = out.replace("↵", "").replace("\n", "")
    assert f"⟦{space}hello</s>⟧" in shown
    assert f"⟦{space}a</s>⟧" in shown


@of("dolly-columns-advice")
def test_the_advice_keeps_the_context(case: Path, kit: Kit, stories: Path) -> None:
    arguments = ("check", "--model", str(stories), "--data", "instresp.jsonl")
    code, _, err = kit(*arguments)
    assert code == 2
    (fault,) = errors(err)
    _, _, advice = fault.partition("or pass ")
    assert advice == "--columns instruction=instruction,input=context,output=response"
    code, out, err = kit(*arguments, *advice.split())
    assert code == 0, err
    assert "ctx" in out
    assert "not read" not in out


# ---------------------------------------------------------------- models and adapters


@of("pad-id-out-of-range")
def test_a_padding_token_beyond_the_vocabulary_is_left_out(
    case: Path, kit: Kit, stories: Path
) -> None:
    model = case / "model"
    model.mkdir()
    for path in stories.iterdir():
        shutil.copyfile(path, model / path.name)
    shutil.copyfile(case / "config.json", model / "config.json")
    code, out, err = kit("train", "--model", "model", "--data", "tiny.jsonl", "--output",
                         "out", "--max-steps", "1", *PLAIN)  # fmt: skip
    assert code == 0, err
    assert (
        f"{model}/config.json: pad_token_id is 600, and the model has 512 tokens: it is left"
        in (out.replace("\n", " "))
    )


@of("adapter-v_empty")
def test_a_base_named_with_nothing_is_taken_from_the_command_line(
    case: Path, kit: Kit, stories: Path
) -> None:
    found, expected = merged_logits(case, kit, stories)
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


@of("adapter-v_lfs")
def test_a_pointer_of_git_lfs_is_told(case: Path, kit: Kit, stories: Path) -> None:
    code, _, err = kit("export", ".", "--to", "out", "--model", str(stories))
    assert code == 2
    assert errors(err) == [
        "error: adapter_model.safetensors: a Git LFS pointer to the file; expected the file "
        "itself; get it with `git lfs pull`, or download it again"
    ]


@pytest.mark.parametrize("case", ["adapter-p_ewt", "adapter-p_resize"], indirect=True)
def test_tables_that_peft_saved_give_its_logits(case: Path, kit: Kit, stories: Path) -> None:
    found, expected = merged_logits(case, kit, stories)
    assert float((found - expected).abs().max()) <= 1e-4
