"""`qlora-kit serve` as its users meet it: a process, asked by OpenAI's client and by strangers."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from serving import ADAPTERS, PROMPTS, REPORT, Models, Server, make_models, server
from support import run, slow
from tiny_models import load_folder

import qlora_kit as qk
from qlora_kit.config import ServeConfig
from qlora_kit.errors import ConfigError, ModelError
from qlora_kit.recipe import serving

KEY = "a-key-of-the-tests-0123456789"
KEPT = {"Authorization": f"Bearer {KEY}"}
LONG: dict[str, Any] = {
    "model": "stories",
    "prompt": "Once upon a time",
    "max_tokens": 480,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def models(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"), stories)


@pytest.fixture(scope="module")
def served(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the defaults: a batch of 8, and 64 that wait."""
    with server(tmp_path_factory.mktemp("served"), *models.arguments) as started:
        yield started
        assert started.process.poll() is None, "no test has ended it"
        assert "Traceback" not in started.log
        assert "failed (" not in started.log, started.log


@pytest.fixture(scope="module")
def client(served: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def narrow(models: Models, tmp_path: Path) -> Iterator[Server]:
    """A server of one row, one place to wait, and a key."""
    with server(
        tmp_path, *models.arguments, "--max-batch", "1", "--queue", "1", "--api-key-env", "A_KEY",
        environment={"A_KEY": KEY},
    ) as started:  # fmt: skip
        yield started


def completed(client: OpenAI, model: str, prompt: str, **more: Any) -> str:
    settings = {"max_tokens": 24, "temperature": 0, **more}
    answer = client.completions.create(model=model, prompt=prompt, **settings)
    return answer.choices[0].text


# ---------------------------------------------------------------- OpenAI's client


def test_the_base_and_each_adapter_are_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stories", *ADAPTERS]
    assert client.models.retrieve("tom").owned_by == "qlora-kit"
    with pytest.raises(openai.NotFoundError, match="expected one of stories, tom, lily"):
        client.models.retrieve("jim")


def test_a_completion_is_what_generate_writes(
    client: OpenAI, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = client.completions.create(model="tom", prompt="The girl", max_tokens=24, temperature=0)
    code, out, err = run(
        "generate", "--raw", "--adapter", str(models.adapters["tom"]), "--prompt", "The girl",
        "--model", str(models.base), "--bits", "16", "--max-new-tokens", "24", "--json",
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert answer.choices[0].text == json.loads(out)["text"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens + 24 == answer.usage.total_tokens


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_chat_goes_through_the_adapters_own_template(
    client: OpenAI, models: Models, name: str
) -> None:
    from transformers import AutoTokenizer

    turns: list[Any] = [
        {"role": "system", "content": "Be kind."},
        {
            "role": "user",
            "content": [{"type": "text", "text": part} for part in ("Who is ", "Lily?")],
        },
    ]
    answer = client.chat.completions.create(
        model=name, messages=turns, max_completion_tokens=16, temperature=0
    )
    tokenizer = AutoTokenizer.from_pretrained(models.adapters[name])
    plain = [turns[0], {"role": "user", "content": "Who is Lily?"}]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert answer.choices[0].message.content == completed(client, name, ids, max_tokens=16)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    # An answer goes back as the client has it, with its empty fields.
    turns += [answer.choices[0].message.model_dump(), {"role": "user", "content": "And Tom?"}]
    again = client.chat.completions.create(model=name, messages=turns, max_tokens=2)
    assert again.usage is not None
    assert again.usage.prompt_tokens > len(ids)


def test_a_stream_has_the_same_text_with_its_counts(client: OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": "Who is Lily?"}]
    asked: dict[str, Any] = {"model": "lily", "messages": turns, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 10, "it comes in pieces"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    texts = client.completions.create(
        model="tom", prompt="He ran", max_tokens=20, temperature=0, stream=True
    )
    assert "".join(c.choices[0].text for c in texts) == completed(
        client, "tom", "He ran", max_tokens=20
    )


def test_a_base_without_a_template_says_so(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(
            model="stories", messages=[{"role": "user", "content": "Hi"}]
        )


@pytest.mark.parametrize("count", [8, *slow(64)])
def test_concurrent_requests_get_the_answers_that_they_get_alone(
    served: Server, client: OpenAI, count: int
) -> None:
    asked = [(["tom", "lily"][n % 2], f"{PROMPTS[n % 8]}{' and' * (n // 8)}") for n in range(count)]
    alone = [completed(client, *each) for each in asked]
    begun = len(served.log)
    with ThreadPoolExecutor(count) as pool:
        together = list(pool.map(lambda each: completed(client, *each), asked))
    assert together == alone
    assert len(set(alone)) > count / 2
    batches = re.findall(r"batch of (\d+) \((.*)\),", served.log[begun:])
    assert max(int(rows) for rows, _ in batches) >= 4
    assert any("tom" in named and "lily" in named for _, named in batches), "adapters are mixed"


def test_a_seed_gives_its_answer_again(client: OpenAI) -> None:
    warm: dict[str, Any] = {"temperature": 1.2, "top_p": 0.9, "max_tokens": 30}
    one, again, other = (
        completed(client, "tom", "The girl", seed=seed, **warm) for seed in (1, 1, 2)
    )
    assert one == again != other
    # Without a seed each is drawn anew.
    drawn = {completed(client, "tom", "The girl", **warm) for _ in range(3)}
    assert len(drawn) > 1


# ---------------------------------------------------------------- what is refused

GOOD: dict[str, Any] = {"model": "tom", "prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize(
    ("changes", "status", "param", "text"),
    [
        ({"model": "gpt-4"}, 404, "model", "expected one of stories, tom, lily"),
        ({"model": 3}, 400, "model", "expected a valid string"),
        ({"prompt": ""}, 400, "prompt", "expected one text"),
        ({"prompt": ["a", "b"]}, 400, "prompt", "expected one text"),
        ({"prompt": [1, -1]}, 400, "prompt", "expected one text"),
        ({"prompt": [1, 512]}, 400, "prompt", "an id above 511"),
        ({"prompt": "a " * 3000}, 400, "prompt", "expected at most 512 together"),
        ({"max_tokens": 512}, 400, "prompt", "512 for the answer"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"temperature": "hot"}, 400, "temperature", "expected a valid number"),
        ({"temperature": True}, 400, "temperature", "expected a valid number"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"stop": ["a"] * 17}, 400, "stop", "up to 16"),
        ({"n": 2}, 400, "n", "not served with this value"),
        ({"echo": True}, 400, "echo", "not served with this value"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "not served with this value"),
        ({"logit_bias": {"3": 1}}, 400, "logit_bias", "not served with this value"),
        ({"top_k": 4}, 400, "top_k", "not known here"),
        ({"stream_options": {"x" * 500: 1}}, 400, "stream_options." + "x" * 64, "not known here"),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_its_name(
    served: Server, changes: dict[str, Any], status: int, param: str, text: str
) -> None:
    found, body, _ = served.post("/v1/completions", {**GOOD, **changes})
    error = body["error"]
    assert (found, error["param"]) == (status, param), error
    assert text in error["message"], error
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_what_changes_nothing_is_taken(served: Server) -> None:
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    neutral: dict[str, Any] = {
        "n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None, "logit_bias": {},
        "presence_penalty": 0.0, "frequency_penalty": 0, "seed": -3, "stop": [],
    }  # fmt: skip
    found, body, _ = served.post("/v1/completions", {**GOOD, **ignored, **neutral})
    assert found == 200, body
    assert body["usage"]["completion_tokens"] <= 2


def test_refusals_before_the_body_is_read(served: Server) -> None:
    assert served.post("/v1/completions", b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert served.post("/v1/completions", b" " * ((1 << 20) + 1))[0] == 413
    assert served.post("/v1/completions", b"\xff")[0] == 400
    assert served.post("/v1/completions", b'{"model": "\\ud800"}')[0] == 400
    assert served.post("/v1/completions", b"[" * 100_000)[0] == 400
    assert served.get("/v1/completions")[0] == 405
    found, body, _ = served.get("/v2/nothing")
    assert (found, body["error"]["param"]) == (404, None)
    # A page of another site reaches this machine under its own name.
    assert served.get("/v1/models", Host="evil.example:80")[0] == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert served.get("/v1/models", Host=host)[0] == 200
    found, _, headers = served.get("/")
    assert "access-control-allow-origin" not in headers


def test_the_report_of_a_run_is_served_and_nothing_else_of_its_folder(served: Server) -> None:
    found, page, headers = served.get("/reports/tom")
    assert (found, page) == (200, REPORT.format(name="tom"))
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "script" not in headers["content-security-policy"]
    for path in ("/reports/stories", "/reports/../tom", "/reports/tom/adapter_config.json",
                 "/reports/%2e%2e/tom", "/reports//etc/passwd"):  # fmt: skip
        assert served.get(path)[0] == 404, path


VALUES: list[Any] = [
    None, True, 0, -1, 1, 2**63, 10**400, 0.5, 1e308, "", "tom", "stories", "a" * 5000, "\x00",
    "\ud83d\ude00", "</script>", [], [0], ["a"], [[]], {}, {"a": 1}, [None] * 50, [1, 2, 511],
    [{"role": "user", "content": "Hi"}], [{"role": "user"}],
    [{"role": "assistant", "content": None}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}],
    {"include_usage": True}, {"type": "json_object"}, {"type": "text"},
]  # fmt: skip
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "stop", "stream", "stream_options", "n", "logprobs", "echo", "tools", "response_format",
    "logit_bias", "presence_penalty", "user", "", "__class__", "model_config", "é", "a" * 300,
]  # fmt: skip


def malformed(draw: random.Random) -> bytes:
    """Return a body that is nearly right, or wrong in one of many ways."""
    body: dict[str, Any] = {"model": draw.choice(["tom", "lily", "stories"]), "max_tokens": 1}
    if draw.random() < 0.7:
        body |= {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}
        body.pop(draw.choice(["prompt", "messages"]))
    for _ in range(draw.randint(0, 3)):
        body[draw.choice(FIELDS)] = draw.choice(VALUES)
    content = bytearray(json.dumps(body).encode())
    if draw.random() < 0.4:
        for _ in range(draw.randint(1, 6)):
            at = draw.randrange(len(content))
            content[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
    if draw.random() < 0.1:
        content = content[: draw.randrange(len(content))]
    return bytes(content)


@pytest.mark.parametrize("count", [200, *slow(10_000)])
def test_malformed_requests_leave_no_trace(served: Server, client: OpenAI, count: int) -> None:
    draw = random.Random(count)
    expected = completed(client, "tom", "The girl")
    statuses: dict[int, int] = {}
    growth = [resident_bytes(served)]
    for number in range(count):
        path = draw.choice(["/v1/completions", "/v1/chat/completions"])
        with contextlib.closing(served.connection()) as connection:
            connection.request("POST", path, malformed(draw), {"Content-Type": "application/json"})
            if draw.random() < 0.05:
                continue  # the caller goes away without an answer
            answer = connection.getresponse()
            content = answer.read()
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        if answer.status >= 400:
            error = json.loads(content)["error"]
            assert error["message"]
            assert answer.status < 500, error
        if number == count // 4:
            growth.append(resident_bytes(served))
    assert set(statuses) <= {200, 400, 404, 413, 429}, statuses
    assert statuses[400] > count / 3, statuses
    assert completed(client, "tom", "The girl") == expected, "it answers at the end"
    assert "Traceback" not in served.log
    # What is loaded with the first requests is no growth of the later ones.
    assert resident_bytes(served) - growth[-1] < 64 * 2**20


def resident_bytes(served: Server) -> int:
    import psutil

    return int(psutil.Process(served.process.pid).memory_info().rss)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 50\r\n\r\n{",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 50_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ],
)  # fmt: skip
def test_bytes_that_are_no_request_disturb_nobody(
    served: Server, client: OpenAI, sent: bytes
) -> None:
    address = ("127.0.0.1", served.port)
    with contextlib.suppress(ConnectionError), socket.create_connection(address, 20) as raw:
        raw.sendall(sent)
        with contextlib.suppress(OSError):  # no error of connections: the server has hung up
            raw.shutdown(socket.SHUT_WR)
        raw.recv(65536)
    assert completed(client, "stories", "He ran", max_tokens=2)


# ---------------------------------------------------------------- callers that go, queue, key, end


def test_an_answer_that_nobody_waits_for_is_given_up(served: Server) -> None:
    for stream in (True, False):
        begun = len(served.log)
        body = json.dumps({**LONG, "stream": stream})
        with contextlib.closing(served.connection()) as connection:
            connection.request(
                "POST", "/v1/completions", body, {"Content-Type": "application/json"}
            )
            served.wait_for(r"batch of 1 \(stories 1\)", begun)
        served.wait_for(r"stories: cancelled after \d+ tokens", begun)
        assert served.get("/health")[1] == {"status": "ok", "running": 0, "waiting": 0}


def test_the_queue_the_key_and_a_signal(narrow: Server) -> None:
    """One server of its own for what needs one: a full queue, a key, and an end."""
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic !"}):
        found, body, headers = narrow.get("/v1/models", **given)
        assert (found, body["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"].startswith("Basic")
    assert narrow.get("/")[0] == 401
    assert narrow.get("/reports/tom")[0] == 401
    assert narrow.get("/health")[0] == 200
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    assert narrow.get("/reports/tom", Authorization=f"Basic {basic}")[0] == 200, "as a browser asks"
    address = f"{narrow.url}/v1"
    with (
        OpenAI(base_url=address, api_key=KEY, max_retries=0) as keyed,
        ThreadPoolExecutor(2) as pool,
    ):
        answers = [pool.submit(narrow.post, "/v1/completions", LONG, **KEPT) for _ in range(2)]
        until(lambda: narrow.get("/health")[1] == {"status": "ok", "running": 1, "waiting": 1})
        with pytest.raises(openai.RateLimitError) as full:
            keyed.completions.create(**GOOD)
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
        assert full.value.code == "queue_full"
        # Now it ends: it answers what it has taken, and takes nothing more.
        narrow.process.send_signal(signal.SIGTERM)
        until(lambda: not is_open(narrow.port))
        texts = [answer.result() for answer in answers]
    assert [found for found, *_ in texts] == [200, 200]
    assert texts[0][1]["choices"] == texts[1][1]["choices"]
    assert narrow.process.wait(60) == 143
    assert narrow.log.splitlines()[-1] == "error: stopped by SIGTERM"
    assert KEY not in narrow.log
    assert "Once upon" not in narrow.log


def until(is_so: Any) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


@pytest.mark.slow
def test_a_second_signal_ends_at_once(models: Models, tmp_path: Path) -> None:
    with (
        server(tmp_path, *models.arguments, "--max-batch", "1") as started,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = [pool.submit(started.post, "/v1/completions", LONG) for _ in range(8)]
        started.wait_for("batch of 1")
        started.process.send_signal(signal.SIGINT)
        until(lambda: not is_open(started.port))
        assert started.ended(signal.SIGINT) == 130
        assert all(answer.exception() or answer.result()[0] >= 500 for answer in answers)


@pytest.mark.slow
def test_a_late_answer_says_so(models: Models, tmp_path: Path) -> None:
    with server(tmp_path, *models.arguments, "--timeout", "0.2") as started:
        found, body, _ = started.post("/v1/completions", LONG)
        assert (found, body["error"]["type"]) == (504, "server_error")
        assert "0.2 s is up" in body["error"]["message"]
        address = f"{started.url}/v1"
        with (
            OpenAI(base_url=address, api_key="none", max_retries=0) as client,
            pytest.raises(openai.APIError, match=r"0\.2 s is up"),
        ):
            list(client.completions.create(**LONG, stream=True))


# ---------------------------------------------------------------- how it starts


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (("--port", "70000"), 2, "port"),
        (("--host", "no.such.host.invalid"), 2, "no such host"),
        (("--api-key-env", "NOT_SET_HERE"), 2, "is not set"),
        (("--model", "t5-small"), 2, "reads a source"),
        (("--adapter", "no/such/folder"), 2, "no/such/folder"),
        (("--model", "demo", "--max-length", "100000"), 2, "512 positions"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    options: tuple[str, ...], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = () if "--port" in options else ("--port", "0")
    found, _, err = run("serve", *options, *more, "--weights", "random", capsys=capsys)
    assert found == code, err
    assert err.count("\n") == 1
    assert text in err


def test_no_adapter_has_the_name_of_the_base() -> None:
    named = serving._named(ServeConfig(model="demo", adapter=Path("runs/demo")))
    assert named.adapters == {"demo-adapter": Path("runs/demo")}
    named = serving._named(ServeConfig(model="demo", adapter=Path("runs/mine")))
    assert named.adapters == {"mine": Path("runs/mine")}
    with pytest.raises(ConfigError, match="the name of the base"):
        serving._named(ServeConfig(model="demo", adapters={"demo": Path("runs/mine")}))


def test_a_port_that_is_taken_is_known_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, out, err = run("serve", "--model", "demo", "--port", port, capsys=capsys)
    assert code == 3
    assert err.startswith(f"error: --port {port} on 127.0.0.1: address already in use; expected")
    assert "serving" not in out


def test_without_its_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = serving.find_spec
    monkeypatch.setattr(
        serving, "find_spec", lambda name: None if name == "uvicorn" else real(name)
    )
    code, _, err = run("serve", capsys=capsys)
    assert code == 3
    assert "uvicorn not installed" in err
    assert "pip install 'qlora-kit[serve]'" in err


def test_a_public_address_without_a_key_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise ModelError("here the test ends")

    monkeypatch.setattr(serving, "_opened", stop)
    monkeypatch.setitem(os.environ, "A_KEY", KEY)
    warned = "whoever reaches this machine may ask"
    assert warned in run("serve", "--host", "0.0.0.0", "--port", "0", capsys=capsys)[1]
    for safe in (("--host", "0.0.0.0", "--api-key-env", "A_KEY"), ("--host", "127.0.0.1")):
        _, out, err = run("serve", *safe, "--port", "0", capsys=capsys)
        assert warned not in out
        assert KEY not in out + err


def test_an_adapter_that_shares_no_base_is_served_by_itself(models: Models, tmp_path: Path) -> None:
    base = load_folder(models.base, 16)
    spec = qk.LoraSpec(rank=2, targets=("q_proj",), modules_to_save=("lm_head",))
    folder = tmp_path / "whole"
    folder.mkdir()
    qk.save_adapter(qk.attach(base, spec), folder, qk.BaseRecord.of(base))
    arguments = [*models.arguments[len(models.adapters) :], "--adapter", str(folder)]
    with server(tmp_path, *arguments) as started:
        assert "the base alone is not served" in started.log
        assert [each["id"] for each in started.get("/v1/models")[1]["data"]] == ["whole"]
        found, body, _ = started.post("/v1/completions", {**GOOD, "model": "whole"})
        assert found == 200, body
