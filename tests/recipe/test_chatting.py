"""`qlora-kit chat` as a user has it: a real process on a real terminal, and through a pipe."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import run
from t5_models import save_t5, t5_tokenizer
from tiny_models import fill_lora

import qlora_kit as qk
from qlora_kit.cli.run import _answers_to_stdout
from qlora_kit.events import AnswerPart, Told
from qlora_kit.report.terminal import Terminal

ASKED = "Spoken: two dollars"
SHORT = ("--max-new-tokens", "12", "--chat-template", "alpaca")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_MOST_SECONDS = 120


class Typist:
    """A process of the command on a terminal of its own, and somebody who types there."""

    def __init__(self, *arguments: str, state: Path) -> None:
        self._terminal, own = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qlora_kit", "chat", *arguments],
            stdin=own, stdout=own, stderr=own,
            env={**os.environ, "XDG_STATE_HOME": str(state), "TERM": "dumb", "COLUMNS": "200"},
            start_new_session=True,
            # Only of the terminal that controls it does a process get Ctrl-C.
            preexec_fn=lambda: fcntl.ioctl(own, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(own)
        self.raw = ""

    def reads(self, until: str = "\n> ", least: int = 0) -> str:
        """Return what is shown up to a text and over `least` characters, without colours."""
        end, start = time.monotonic() + _MOST_SECONDS, len(self.raw)
        while until not in (shown := _plain(self.raw[start:])) or len(shown) < least:
            assert time.monotonic() < end, f"no {until!r} in {shown!r}"
            if not select.select([self._terminal], [], [], 1)[0]:
                continue
            try:
                more = os.read(self._terminal, 1 << 16)
            except OSError as error:
                raise AssertionError(f"it ended after {shown!r}") from error
            self.raw += more.decode("utf-8", "replace")
        return shown

    def types(self, text: str, until: str = "\n> ", least: int = 0) -> str:
        """Type a text; return what is shown then."""
        os.write(self._terminal, text.encode())
        return self.reads(until, least)

    def ends(self, typed: str) -> int:
        """Type a text that ends the program; return its exit code."""
        os.write(self._terminal, typed.encode())
        try:
            return self._process.wait(_MOST_SECONDS)
        finally:
            self._process.kill()
            os.close(self._terminal)


def _plain(raw: str) -> str:
    return _ESCAPES.sub("", raw).replace("\r", "")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the demo, which answers otherwise than its base."""
    base = qk.open_base(qk.BaseModelOptions(model="demo", bits=4)).base
    adapter = qk.attach(base, qk.LoraSpec(rank=4, targets=("all-linear",)))
    fill_lora(adapter, std=0.2)
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    qk.save_adapter(adapter, folder, qk.BaseRecord.of(base))
    return folder


@pytest.fixture(scope="module")
def texts(adapter: Path) -> dict[str, str]:
    """What `generate` answers, with the adapter and without."""
    found = {}
    for name, given in (("mine", ("--adapter", str(adapter))), ("off", ("--model", "demo"))):
        found[name] = str(generated(*given, "--prompt", ASKED, *SHORT)["text"]).strip()
    assert found["mine"] != found["off"]
    return found


def generated(*arguments: str) -> dict[str, Any]:
    from qlora_kit.cli.options import configure
    from qlora_kit.config import GenerateConfig
    from qlora_kit.recipe import generate

    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in pairs}
    return generate(configure(GenerateConfig, given))


# ---------------------------------------------------------------- a terminal


@pytest.fixture(scope="module")
def typist(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Typist]:
    state = tmp_path_factory.mktemp("state")
    typist = Typist("--adapter", str(adapter), *SHORT, state=state)
    assert "adapter mine; /help lists commands" in typist.reads()
    yield typist
    assert typist.ends("\x04") == 0
    file = state / "qlora-kit" / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert ASKED in file.read_text().splitlines()


def test_answers_are_those_of_generate_and_adapters_are_switched(
    typist: Typist, texts: dict[str, str]
) -> None:
    assert f"\n{texts['mine']}\n[" in typist.types(f"{ASKED}\n")
    assert "adapter: mine, off (answers)" in typist.types("/adapter off\n")
    assert "0 turns left" in typist.types("/undo\n")
    shown = typist.types(f"{ASKED}\n")
    assert f"\n{texts['off']}\n[" in shown
    assert re.search(r"\[\d+ tokens · [\d.,]+ tokens/s · first after [\d.]+ s · prompt", shown)
    assert "adapter: mine (answers), off" in typist.types("/adapter mine\n")
    typist.types("/clear\n")
    assert f"\n{texts['mine']}\n[" in typist.types(f"{ASKED}\n")
    typist.types("/clear\n")


def test_what_is_saved_can_be_trained_on(
    typist: Typist, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talks.jsonl"
    assert "no turn has an answer" in typist.types(f"/save {file}\n")
    assert "system: Be brief." in typist.types("/system Be brief.\n")
    typist.types('"""two\n', until=". ")
    typist.types('lines"""\n')
    typist.types("and\\\n", until=". ")
    typist.types("more\n")
    assert "line 1: `train --data" in typist.types(f"/save {file}\n")
    assert "line 2: `train --data" in typist.types(f"/save {file}\n")
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first == second
    said = [(m["role"], m["content"]) for m in first["messages"]]
    assert said[0] == ("system", "Be brief.")
    assert [role for role, _ in said[1:]] == ["user", "assistant"] * 2
    assert (said[1][1], said[3][1]) == ("two\nlines", "and\nmore")
    code, out, err = run("check", "--model", "demo", "--data", str(file), "--json", capsys=capsys)
    assert code == 0, err
    assert "chat" in out
    assert "system: nothing" in typist.types("/system off\n")
    typist.types("/clear\n")
    other = tmp_path / "notes.jsonl"
    other.write_text("my notes\n")
    typist.types(f"{ASKED}\n")
    assert "its last line is no record" in typist.types(f"/save {other}\n")
    assert "name a .jsonl file" in typist.types(f"/save {tmp_path}/x.txt\n")
    assert other.read_text() == "my notes\n"


def test_what_is_no_command_is_said(typist: Typist) -> None:
    assert "did you mean /undo?" in typist.types("/unod\n")
    assert "error: /adapter: no adapter is named 'their'" in typist.types("/adapter their\n")
    assert "/adapter [NAME|off]" in typist.types("/help\n")
    assert "tokens" in typist.types("//unod is a word\n"), "it is a text"


def test_ctrl_c_drops_a_line(typist: Typist) -> None:
    typist.types("half a li", until="half a li")
    # A signal between the echo and the wait for more would only be seen with the next key.
    time.sleep(0.3)
    shown = typist.types("\x03")
    assert "Ctrl-D or /quit ends the conversation" in shown
    typist.types("/clear\n")
    assert "tokens" in typist.types(f"{ASKED}\n"), "it goes on"


def test_ctrl_c_stops_an_answer_and_not_the_program(tmp_path: Path) -> None:
    hot = ("--max-new-tokens", "100000", "--temperature", "8")
    typist = Typist("--model", "demo", *hot, state=tmp_path)
    typist.reads()
    typist.types(f"{ASKED}\n", until=f"{ASKED}\n", least=len(ASKED) + 20)
    shown = typist.types("\x03")
    assert "· stopped]" in shown
    assert "took the last turn" in typist.types("/undo\n"), "it goes on, and what came has stayed"
    assert typist.ends("/quit\n") == 0


# ---------------------------------------------------------------- a pipe


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    def given(raw: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))

    return given


def test_each_line_of_a_pipe_is_a_turn_and_the_answers_are_plain_text(
    pipe: Any, adapter: Path, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(f"{ASKED}\n\n/adapter off\n".encode())
    code, out, err = run("chat", f"--adapter=mine={adapter}", *SHORT, capsys=capsys)
    assert code == 0, err
    assert out.startswith(f"{texts['mine']}\n")
    assert "adapter:" not in out + err, "a line that begins with a slash is a turn like others"
    assert "tokens/s" not in out


def test_an_adapter_that_is_alone_has_the_name_that_it_is_given(
    pipe: Any, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(b"hi\n")
    code, out, err = run("chat", f"--adapter=its={adapter}", *SHORT, "--json", capsys=capsys)
    assert code == 0, err
    assert json.loads(out)["adapter"] == "its"


def test_a_program_is_given_the_conversation(
    pipe: Any, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(f"{ASKED}\n".encode())
    code, out, err = run("chat", "--model", "demo", *SHORT, "--json", capsys=capsys)
    assert code == 0, err
    (record,) = json.loads(out)["records"]
    assert [m["content"] for m in record["messages"]] == [ASKED, texts["off"]]


def test_texts_are_continued_where_there_is_no_template(
    pipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(b"Spoken: two dollars Written:\nHello\n")
    code, out, err = run("chat", "--model", "demo", "--max-new-tokens", "4", capsys=capsys)
    assert code == 0, err
    assert "each text is continued as it is, and those before it are not seen" in err
    alone = generated("--model", "demo", "--prompt", "Hello", "--max-new-tokens", "4")
    assert out.endswith(f"{alone['text'].strip()}\n")


@pytest.mark.parametrize(
    ("raw", "given", "expected"),
    [
        (b"ok\n\xff\n", (), "standard input:2: not UTF-8"),
        (b"hi\n", ("--system", "Be brief."), "/system: no chat template is used"),
        (b"hi\n", ("--context", "1"), "--context: found 1"),
        (b"hi\n", ("--context", "1000000"), "--context 1000000: the model has"),
        (b"hi\n", ("--adapter", "nowhere"), "nowhere: no such folder"),
        (b"hi\n", ("--adapter", "x", "--adapter", "y"), "several adapters need a name each"),
    ],
)
def test_what_cannot_be_is_one_line(
    pipe: Any,
    raw: bytes,
    given: tuple[str, ...],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe(raw)
    code, _, err = run("chat", *given, "--max-new-tokens", "1", capsys=capsys)
    assert code == 2
    assert expected in err.splitlines()[-1]


def test_a_model_that_has_no_turns_is_refused(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    t5_tokenizer("a b c").save_pretrained(save_t5(tmp_path))
    pipe(b"hi\n")
    code, _, err = run("chat", "--model", str(tmp_path), capsys=capsys)
    assert code == 2
    assert "chat: the model answers a source, and has no memory of turns" in err.splitlines()[-1]


def test_escape_sequences_of_a_model_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b[2Jb\x07\x9b31m\u202ec d\n"
    stream = io.StringIO()
    terminal = Terminal(Console(file=stream, force_terminal=True, highlight=False))
    terminal(AnswerPart(evil))
    terminal(Told(evil))
    _answers_to_stdout(AnswerPart(evil))
    written = "a\\x1b[2Jb\\x07\\x9b31m\\u202ec d\n"
    assert stream.getvalue() == written + written + "\n"
    assert capsys.readouterr().out == written
