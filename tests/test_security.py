"""The promises of SECURITY.md: the limits of a stranger's file, and secrets that never show."""

from __future__ import annotations

import ast
import json
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import CHATML, make_tokenizer
from faults.hostile import Attack, attacks, run
from support import PROJECT

from qlora_kit.errors import AdapterError, InputError, ModelError
from qlora_kit.redact import one_line, redacted, redacted_values
from qlora_kit.storage import check_confined
from qlora_kit.time_limit import TimeUp, many_limits, time_limit

# ---------------------------------------------------------------- hostile artefacts


@pytest.mark.parametrize("name", attacks())
def test_a_hostile_artefact_is_refused_and_touches_nothing(name: str, tmp_path: Path) -> None:
    guarded, folder = tmp_path / "guarded", tmp_path / "artefact"
    guarded.mkdir()
    folder.mkdir()
    attack: Attack = attacks()[name]
    attack(folder, guarded / "canary")


def test_there_are_enough_kinds_of_them() -> None:
    assert len(attacks()) >= 15


# ---------------------------------------------------------------- folders


def test_a_snapshot_of_the_hub_keeps_to_itself(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "ff").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/ff")
    check_confined(snapshot)
    named_by_the_user = tmp_path / "mine"
    named_by_the_user.symlink_to(snapshot)
    check_confined(named_by_the_user)


def test_links_inside_of_a_folder_are_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "log").write_text("")
    (folder / "latest").symlink_to("wandb")
    (folder / "to-nowhere").symlink_to("missing")
    (folder / "itself").symlink_to("itself")
    # Nothing is read from a folder with a dot, such as a virtual environment.
    (folder / ".venv").mkdir()
    (folder / ".venv" / "python").symlink_to("/usr/bin/env")
    check_confined(folder)
    check_confined(tmp_path / "missing")


@pytest.mark.parametrize("target", ["/etc/passwd", "../..", "../../beside", "/nowhere"])
def test_a_link_outside_is_refused_by_its_name(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "run"
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "link").symlink_to(target)
    with pytest.raises(AdapterError, match=r"link: a link to .*, outside of .*; expected .*; put"):
        check_confined(folder, AdapterError)
    with pytest.raises(InputError):
        check_confined(folder)


# ---------------------------------------------------------------- time


def _spin() -> None:
    while True:
        pass


@pytest.fixture
def own_timer() -> Iterator[list[int]]:
    """A handler and a timer of the program that uses the kit; yields the signals it received."""
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    signal.setitimer(signal.ITIMER_REAL, 100)
    yield heard
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_block_over_its_time_is_ended_and_the_timer_put_back(own_timer: list[int]) -> None:
    handler = signal.getsignal(signal.SIGALRM)
    for _ in range(2):
        with pytest.raises(TimeUp), time_limit(0.05):
            _spin()
        with many_limits():
            with time_limit(5):
                pass
            with pytest.raises(TimeUp), time_limit(0.05):
                re.fullmatch(r"(a+)+b", "a" * 40)
    assert signal.getsignal(signal.SIGALRM) is handler
    assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    assert own_timer == []


def test_elsewhere_than_in_the_main_thread_there_is_no_limit() -> None:
    reached: list[bool] = []

    def work() -> None:
        with many_limits(), time_limit(1e-6):
            reached.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == [True]


def test_a_template_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_kit.data import chat_template
    from qlora_kit.data.template import Renderer

    forks: list[int] = []
    fork = chat_template.os.fork
    monkeypatch.setattr(chat_template.os, "fork", lambda: forks.append(1) or fork())
    monkeypatch.setattr(chat_template, "_passed", set())
    for _ in range(2):
        Renderer(make_tokenizer(chat_template=CHATML))
        Renderer(make_tokenizer())  # the kit's own template needs no probe
    assert len(forks) == 1


def test_a_template_that_ends_like_the_kits_own_is_probed_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qlora_kit.data import chat_template
    from qlora_kit.data.template import Renderer

    monkeypatch.setattr(chat_template, "PROBE_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = endless + chat_template.built_in_templates()["alpaca"]
    with pytest.raises(ModelError, match="does not finish"):
        Renderer(make_tokenizer(chat_template=template))


# ---------------------------------------------------------------- what real adapters hold


def test_every_field_that_peft_writes_is_known_or_unset() -> None:
    from dataclasses import asdict

    from peft import LoraConfig

    from qlora_kit.lora import files

    known = {"peft_type", *files.PeftConfig.model_fields, *files._UNSUPPORTED, *files._HARMLESS}
    written = asdict(LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert {name for name, value in written.items() if value and name not in known} == set()


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj", "model.layers.0.self_attn.q_proj", r"layers\.1\.mlp\.down_proj",
        r"layers\.[02]\..*up_proj", r"^model\.layers\.(?:1[0-9]|2[0-7])\.mlp\.up_proj$",
        r".*\.layers\.\d+\..*q_proj", r"(q|k|v)_proj", r"layers\.\d{1,2}\.self_attn\.[qk]_proj",
    ],
)  # fmt: skip
def test_patterns_that_people_write_are_accepted(pattern: str) -> None:
    from qlora_kit.lora.files import PeftConfig

    assert PeftConfig.model_validate({"rank_pattern": {pattern: 4}}).rank_pattern == {pattern: 4}


def test_a_pattern_for_every_layer_is_quick() -> None:
    from qlora_kit.lora.files import PeftConfig
    from qlora_kit.lora.spec import LoraSpec

    names = [f"model.layers.{n}.self_attn.{k}_proj" for n in range(150) for k in "qkvo"]
    patterns = PeftConfig.model_validate({"rank_pattern": dict.fromkeys(names, 4)}).rank_pattern
    spec = LoraSpec(rank=8, rank_pattern=patterns or {})
    with time_limit(2):
        assert {spec.rank_of(name) for name in names} == {4}


def test_the_block_size_of_a_record_is_that_of_the_kit() -> None:
    from qlora_kit.layers.weight import BLOCK_SIZE
    from qlora_kit.lora.files import BaseRecord

    assert BaseRecord.model_fields["block_size"].default == BLOCK_SIZE


def test_numbers_of_every_known_model_are_within_the_bounds(tmp_path: Path) -> None:
    from qlora_kit.model.config_file import read_model_config
    from qlora_kit.model.names import known_models

    for source in known_models().values():
        numbers = dict(source.architecture or {})
        (tmp_path / "config.json").write_text(json.dumps(numbers))
        assert read_model_config(tmp_path / "config.json") == numbers


def test_numbers_that_released_models_have_are_accepted(tmp_path: Path) -> None:
    from qlora_kit.model.config_file import read_model_config

    path = tmp_path / "config.json"
    path.write_text(
        '{"time_step_limit": [0.0, Infinity], "num_experts": 0, "head_dim": null, "rope_theta": '
        '1e11, "num_key_value_heads": [8, 4], "max_position_embeddings": 10485760, '
        '"text_config": {"hidden_size": 53248}, "rope_scaling": null, "layers": {"a": 1}}'
    )
    assert read_model_config(path)["num_experts"] == 0
    path.write_text('{"text_config": {"hidden_size": -1}}')
    with pytest.raises(ModelError, match=r"config\.json: hidden_size is -1; expected a whole"):
        read_model_config(path)


# ---------------------------------------------------------------- secrets

TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8" * 2
KEY = "0123456789abcdef0123456789abcdef01234567"
PASSWORD = 'corr"ect horse/battery'
PLANTED = (TOKEN, KEY, PASSWORD)


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MY_DATABASE_PASSWORD", PASSWORD)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"token {TOKEN}.", "token [redacted]."),
        (f"https://x.org/a?token={TOKEN}&b=1", "https://x.org/a?token=[redacted]&b=1"),
        ("https://me:se%40cret@x.org/y", "https://[redacted]@x.org/y"),
        ("https:/me:secret@x.org/y", "https:/[redacted]@x.org/y"),
        ("s3://b/c?X-Amz-Signature=abc&d", "s3://b/c?X-Amz-Signature=[redacted]&d"),
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer [redacted]"),
        ("sk-proj-abcdEFGH1234ijklMNOP5678", "[redacted]"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "[redacted]"),
        ("github_pat_11ABCDEFG0abcdefghijkl_mnop", "[redacted]"),
    ],
)
def test_the_form_of_a_token_is_enough(text: str, expected: str) -> None:
    assert redacted(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "revision 0123456789abcdef0123456789abcdef01234567",
        "deepseek-ai/deepseek-llm-7b-base", "hf_model/checkpoint-100", "hf-internal-testing/tiny",
        "/home/user/hf_transformers_integration/run", "task-oriented-dialogue-generation-v2",
        "sk-learn-compatible-estimator", "the bearer of good news", "bearer instruments",
        "http://localhost:8080/path@version", "git@github.com:owner/name.git",
        "https://user@host/x", "eos_token=<|endoftext|>", "C:\\Users\\me\\model", "a: b@c",
        "mailto:someone@example.org", "loss 2.3026  lr 2.00e-04", "step 1/20",
    ],
)  # fmt: skip
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redacted(text) == text


def test_secrets_of_the_environment_go_in_every_form(secrets: None) -> None:
    for text in (KEY, PASSWORD, json.dumps(PASSWORD), repr(PASSWORD), TOKEN.upper() + TOKEN):
        found = redacted(f"x {text} y")
        assert "[redacted]" in found
        assert not any(secret in found for secret in PLANTED)
    record = {"a": [TOKEN, Path(f"/x/{KEY}")], KEY: (PASSWORD, 1, None, 2.5)}
    assert redacted_values(record) == {
        "a": ["[redacted]", Path("/x/[redacted]")],
        "[redacted]": ("[redacted]", 1, None, 2.5),
    }


def test_names_that_only_sound_secret_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKENIZERS_PARALLELISM", "TOKEN_COUNT", "KEYBOARD", "MY_TOKEN_FILE", "SECRETARY"):
        monkeypatch.setenv(name, "attention")
    monkeypatch.setenv("SHORT_TOKEN", "demo")
    assert redacted("attention of the demo") == "attention of the demo"


def test_the_token_of_a_login_is_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("an-old-kind-of-token\n")
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert redacted("is an-old-kind-of-token here") == "is [redacted] here"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "missing"))
    assert redacted("is an-old-kind-of-token here") == "is an-old-kind-of-token here"


def test_an_error_is_one_line_without_secrets(secrets: None) -> None:
    error = ModelError(f"a\nb\x1b[31m {TOKEN}", "second")
    assert error.faults == ("a\\nb\\x1b[31m [redacted]", "second")
    assert str(error) == "a\\nb\\x1b[31m [redacted]\nsecond"
    assert one_line("\u202egnol\u2028") == "\\u202egnol\\u2028"


def _shown(folder: Path, *texts: str) -> None:
    """Assert that no secret is in texts or in any byte of the files of a folder."""
    contents = [text.encode() for text in texts]
    names = "\n".join(str(path.relative_to(folder)) for path in folder.rglob("*")).encode()
    contents += [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for secret in PLANTED:
        for form in (secret, json.dumps(secret)[1:-1]):
            assert not any(form.encode() in content for content in (*contents, names)), form


def _rows(folder: Path) -> Path:
    folder.mkdir(parents=True)
    lines = (PROJECT / "qlora_kit" / "demo" / "test.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:60]))
    return folder / "rows.jsonl"


# `--debug` adds to the output of a command that fails, as the command of the next test does.
@pytest.mark.usefixtures("simulated_once")
@pytest.mark.parametrize(
    "extra", [(), ("--json",), pytest.param(("--debug",), marks=pytest.mark.slow)]
)
def test_a_run_shows_and_writes_no_secret(
    tmp_path: Path, secrets: None, extra: tuple[str, ...]
) -> None:
    from qlora_kit.model.names import find_model

    data, output = _rows(tmp_path / TOKEN), tmp_path / "run"
    model = tmp_path / KEY / "model"
    shutil.copytree(str(find_model("demo").folder), model)
    few = ("--batch-size", "2", "--gradient-accumulation-steps", "1", "--samples", "1")
    where = ("--model", model, "--data", data, "--output", output, "--device", "cpu")
    train = ("train", *where, *few)
    code, out, err = run(*train, "--max-steps", "2", "--save-steps", "1", *extra)
    assert code == 0, err
    _shown(output, out, err)
    assert "[redacted]" in out + (output / "training_config.yaml").read_text()
    code, out, err = run(*train, "--max-steps", "3", "--resume", *extra)
    assert code == 0, err
    _shown(output, out, err)
    merged = tmp_path / "merged"
    verified = ("--verify-tokens", "64")
    code, out, err = run("export", output, "--to", merged, "--model", model, *verified, *extra)
    assert code == 0, err
    _shown(merged, out, err)


def _failing(tmp_path: Path) -> dict[str, Callable[[], tuple[Any, ...]]]:
    address = f"https://me:{TOKEN}@host.org/model"

    def adapter() -> tuple[Any, ...]:
        from faults.hostile import _adapter

        return "evaluate", "--adapter", _adapter(tmp_path, base_model_name_or_path=address)

    def config() -> tuple[Any, ...]:
        (tmp_path / "run.yaml").write_text(json.dumps({"rank": TOKEN, TOKEN: 1, "bits": [KEY]}))
        return "train", "--config", tmp_path / "run.yaml"

    return {
        "model": lambda: ("train", "--model", address),
        "hub id": lambda: ("train", "--model", f"owner/{TOKEN}", "--output", tmp_path / "run"),
        "data": lambda: ("train", "--data", address, "--output", tmp_path / "run"),
        "flag": lambda: ("train", "--rank", TOKEN, "--bits", PASSWORD),
        "no such flag": lambda: ("train", f"--{TOKEN}"),
        "no such command": lambda: (TOKEN,),
        "adapter's base": adapter,
        "configuration": config,
        "dry run": lambda: ("train", "--data", address, "--output", KEY, "--dry-run"),
    }


@pytest.mark.parametrize("extra", [(), ("--json",), ("--debug",)])
@pytest.mark.parametrize("case", _failing(Path()))
def test_a_failing_command_shows_no_secret(
    tmp_path: Path, secrets: None, case: str, extra: tuple[str, ...]
) -> None:
    arguments = _failing(tmp_path)[case]()
    _, out, err = run(*arguments, *(extra if case != "no such command" else ()))
    written = tmp_path / "run"
    _shown(written, out, err)
    assert "[redacted]" in out + err


@pytest.mark.parametrize("extra", [(), ("--debug",)])
def test_an_internal_error_shows_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, secrets: None, extra: tuple[str, ...]
) -> None:
    import qlora_kit.recipe

    def broken(*_: object) -> dict[str, object]:
        try:
            raise OSError(f"https://me:{KEY}@host.org refused {TOKEN}")
        except OSError as error:
            raise ZeroDivisionError(PASSWORD) from error

    monkeypatch.setattr(qlora_kit.recipe, "train", broken)
    code, out, err = run("train", *extra)
    assert code == 1
    _shown(tmp_path, out, err)
    assert "[redacted]" in err


def test_an_answer_shows_no_secret(tmp_path: Path, secrets: None) -> None:
    for extra in ((), ("--json",)):
        code, out, err = run("generate", "--prompt", TOKEN, "--max-new-tokens", "1", *extra)
        assert code == 0, err
        _shown(tmp_path, out, err)


# ---------------------------------------------------------------- the source

_TREES = {
    path.relative_to(PROJECT / "qlora_kit").as_posix(): ast.parse(path.read_text())
    for path in sorted((PROJECT / "qlora_kit").rglob("*.py"))
}
_CALLS = [
    (file, ast.unparse(node.func), node, {k.arg: ast.unparse(k.value) for k in node.keywords})
    for file, tree in _TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
]


def _imported() -> Iterator[tuple[str, str]]:
    for file, tree in _TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield file, node.module or ""
                yield from ((file, f"{node.module}.{alias.name}") for alias in node.names)


def test_only_the_checkpoint_loads_pickles_and_only_tensors_of_them() -> None:
    loads = [call for call in _CALLS if call[1] in ("torch.load", "load") or "unpickle" in call[1]]
    assert {file for file, name, *_ in loads if name == "torch.load"} == {"model/checkpoint.py"}
    assert all(
        keywords["weights_only"] == "True" for _, name, _, keywords in loads if name == "torch.load"
    )
    banned = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "imp")
    found = {(f, m) for f, m in _imported() if m.split(".")[0] in banned}
    # What the processes of one run tell each other through pipes, and what a process holds itself.
    assert found == {("data/stream_worker.py", "pickle"), ("data/stream.py", "pickle")}


def test_nothing_evaluates_or_starts_anything() -> None:
    banned = {
        "eval", "exec", "compile", "os.system", "os.popen", "os.spawnv",
        "importlib.reload", "torch.hub.load", "yaml.unsafe_load", "yaml.full_load",
    }  # fmt: skip
    assert not [(file, name) for file, name, *_ in _CALLS if name in banned]
    starts = [(f, m) for f, m in _imported() if m.split(".")[0] in ("subprocess", "pty", "code")]
    assert starts == [("data/stream_worker.py", "subprocess")]
    # It starts Python itself, with a program that stands in the file.
    program = "[sys.executable, '-P', '-c', _RUN]"
    started = [c for f, n, c, _ in _CALLS if f == "data/stream_worker.py" and "Popen" in n]
    assert [ast.unparse(call.args[0]) for call in started] == [program]
    assert not [file for file, _, _, keywords in _CALLS if "shell" in keywords]
    # Only the program itself may be started again, with its original arguments.
    again = {(file, ast.unparse(call)) for file, name, call, _ in _CALLS if "os.exec" in name}
    itself = "os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])"
    assert again == {("model/environment.py", itself)}
    # Only one call imports a name that is no literal; its names are literals in the same file.
    dynamic = {(f, ast.unparse(c.args[0])) for f, n, c, _ in _CALLS if n == "__import__"}
    assert dynamic <= {("model/hub.py", "package")}


def test_yaml_is_loaded_safely() -> None:
    loaders = {ast.unparse(call.args[1]) for _, name, call, _ in _CALLS if name == "yaml.load"}
    from yaml import SafeLoader

    from qlora_kit.config.resolve import _AsWritten

    assert loaders == {_AsWritten.__name__}
    assert issubclass(_AsWritten, SafeLoader)


def test_code_of_a_model_is_never_trusted_and_the_network_not_asked_for_it() -> None:
    trusted = [k["trust_remote_code"] for *_, k in _CALLS if "trust_remote_code" in k]
    assert trusted
    assert set(trusted) == {"False"}
    opened = [call for call in _CALLS if call[1].endswith("from_pretrained")]
    for file, name, call, keywords in opened:
        is_local = keywords.get("local_files_only") == "True"
        is_folder = not name.startswith("Auto") and ast.unparse(call.args[0]) == "folder"
        assert is_local or is_folder, (file, name)
        assert not name.startswith("Auto") or keywords["trust_remote_code"] == "False"


def test_the_promises_of_security_md_name_tests_that_exist() -> None:
    text = (PROJECT / "SECURITY.md").read_text()
    named = re.findall(r"`(test_\w+)`", text)
    own = Path(__file__).read_text()
    assert named
    assert [name for name in named if f"def {name}(" not in own] == []
    assert [name for name in re.findall(r"`attack:(\w+)`", text) if name not in attacks()] == []
