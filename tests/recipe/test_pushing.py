"""Pushes to a hub on the loopback, and adapters by their hub id: real processes, real requests."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import READER, WRITER, Hub
from support import run_python

from qlora_kit.config import pinned_name
from qlora_kit.errors import ConfigError
from qlora_kit.lora.files import WEIGHTS
from qlora_kit.model.hub import HubName
from qlora_kit.report.card import ForHub, front_of

WRONG = "hf_wrong0123456789abcdefghijkl"
ADAPTER = ("export", "runs/mine", "--form", "adapter", "--to")
# No file of an adapter may tell what the data say, or where they lie.
FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
    "loss.png", "manifest.json", "qlora_kit.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Iterator[Hub]:
    """A hub, and a folder with the run `runs/mine` on a model of the hub."""
    home = tmp_path_factory.mktemp("home")
    hub = Hub(home)
    try:
        rows = [{"prompt": f"secret{i}?", "completion": f"answer{i}"} for i in range(24)]
        (home / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = str(assets / "models" / "stories260K")
        code, _, err = hub.run(
            "train", "--model", model, "--data", "my.jsonl", "--output", "runs/mine",
            "--max-steps", "2", "--batch-size", "2", "--samples", "0", "--validation", "my.jsonl",
        )  # fmt: skip
        assert code == 0, err
        yield hub
    finally:
        hub.close()


@pytest.fixture(autouse=True)
def no_faults(request: pytest.FixtureRequest) -> None:
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").set()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def one_line(err: str) -> str:
    """The only line of errors, after notices."""
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


# ---------------------------------------------------------------- pushing


def test_an_adapter_is_listed_pushed_and_used_by_its_id(hub: Hub) -> None:
    before = hub.state()["requests"]
    code, out, err = hub.run(*ADAPTER, "hub:me/tales", "--dry-run", "--json", token=None)
    assert code == 0, err
    listed = json.loads(out)
    assert hub.state()["requests"] == before, "a dry run asks the hub nothing"
    assert (listed["repository"], listed["revision"]) == ("me/tales", "main")
    assert {file["name"] for file in listed["files"]} == FILES

    code, out, err = hub.run(
        *ADAPTER, "hub:me/tales", "--private", "--license", "apache-2.0", "--json"
    )
    assert code == 0, err
    pushed = json.loads(out)
    there = hub.files("me/tales")
    assert there == {file["name"]: file["sha256"] for file in pushed["files"]}
    assert there[WEIGHTS] == sha256(hub.home / "runs/mine/adapter_model.safetensors")
    assert hub.state()["repositories"]["me/tales"]["private"]
    assert not list((hub.home / "hf").rglob("pushes/*/model")), "what is pushed is not kept"

    # The same again needs no commit; and a private repository is not read without a token.
    code, out, _ = hub.run(*ADAPTER, "hub:me/tales", "--license", "apache-2.0", "--json")
    again = json.loads(out)
    assert (code, again["commit"], again["sent"]) == (0, pushed["commit"], [])
    code, _, err = hub.run("generate", "--adapter", "me/tales", "--prompt", "Once", token=None)
    assert code == 2
    assert "me/tales: no such folder; as a hub id, me/tales: the hub has no such adapter" in err

    code, _, err = hub.run("export", "me/tales", "--form", "adapter", "--to", "out/pulled")
    assert code == 0, err
    assert sha256(hub.home / "out/pulled/adapter_model.safetensors") == there[WEIGHTS]


@pytest.mark.slow
def test_an_adapter_of_the_hub_answers_as_its_folder(hub: Hub) -> None:
    assert hub.run(*ADAPTER, "hub:me/answers")[0] == 0
    asked = ("generate", "--prompt", "Once", "--max-new-tokens", "8", "--json", "--adapter")
    by_id = hub.run(*asked, "me/answers")
    by_folder = hub.run(*asked, "runs/mine")
    assert by_id[0] == by_folder[0] == 0, by_id[2]
    assert by_id[1] == by_folder[1]
    rows = ("evaluate", "--data", "my.jsonl", "--json", "--adapter")
    code, out, err = hub.run(*rows, "one=me/answers", "--adapter", "two=runs/mine")
    assert code == 0, err
    one, two = json.loads(out)["adapters"].values()
    assert one["loss"] == two["loss"]


def test_the_card_says_what_a_hub_asks_for(hub: Hub, assets: Path) -> None:
    code, _, err = hub.run(
        *ADAPTER, "out/card", "--model", "karpathy/stories", "--license", "mit", "--overwrite"
    )
    assert code == 0, err
    folder = hub.home / "out" / "card"
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["base_model"]) == ("mit", "karpathy/stories")
    assert front["library_name"] == "peft"
    assert "lora" in front["tags"]
    (metric,) = front["model-index"][0]["results"][0]["metrics"]
    log = (hub.home / "runs/mine/trainer_log.jsonl").read_text().splitlines()
    losses = [row["eval_loss"] for row in map(json.loads, log) if "eval_loss" in row]
    assert metric["type"] == "loss"
    assert metric["value"] == pytest.approx(min(losses), rel=1e-5)
    for name, key in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("qlora_kit.json", "base"),
    ):
        assert json.loads((folder / name).read_text())[key] == "karpathy/stories"
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"secret1" not in written
    assert str(assets).encode() not in written, "nor the folder of its base"


def test_a_push_that_is_killed_goes_on_and_ends_with_equal_hashes(hub: Hub) -> None:
    merge = (
        "export", "runs/mine", "--to", "hub:me/merged", "--dtype", "float32",
        "--verify-tokens", "0", "--max-shard-size", "1MB",
    )  # fmt: skip
    hub.set(stall_over=500_000)
    process = hub.start(*merge)
    until = time.monotonic() + 120
    # The picture has come whole, and half of a shard.
    while not (hub.state()["stalled"] and hub.state()["received"]):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.1)
    time.sleep(0.5)
    process.kill()
    process.communicate()
    assert hub.files("me/merged") == {}, "nobody sees half a model"
    received = hub.state()["received"]

    hub.set()
    code, out, err = hub.run(*merge, "--json")
    assert code == 0, err
    assert "what an earlier try made is pushed" in err
    pushed = json.loads(out)
    expected = {file["name"]: file["sha256"] for file in pushed["files"]}
    assert hub.files("me/merged") == expected
    assert sum(name.endswith(".safetensors") for name in expected) > 1
    state = hub.state()
    assert len(set(state["received"])) == len(state["received"]), "no file came twice"
    assert state["received"][: len(received)] == received
    assert state["repositories"]["me/merged"]["messages"][1:] == [
        state["repositories"]["me/merged"]["messages"][1]
    ], "one commit"

    # The model is pulled by its id, and the files are those that were sent.
    fetch = (
        "from qlora_kit.model.fetch import fetch; from qlora_kit.model.names import find_model; "
        "print(fetch(find_model('me/merged')).folder)"
    )
    told = subprocess.run(
        [sys.executable, "-c", fetch], env={**hub.environment()}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    snapshot = Path(told.stdout.strip())
    assert snapshot.name == pushed["commit"]
    fetched = {path.name: sha256(path) for path in snapshot.iterdir()}
    assert fetched.items() <= expected.items()
    assert {name for name in expected if name.endswith("safetensors")} <= fetched.keys()


def test_other_content_is_replaced_only_when_asked(hub: Hub) -> None:
    assert hub.run(*ADAPTER, "hub:me/taken")[0] == 0
    first = hub.files("me/taken")
    shutil.copytree(hub.home / "runs/mine", hub.home / "runs/other", dirs_exist_ok=True)
    (hub.home / "runs/other/loss.png").unlink()
    (hub.home / "runs/other/chat_template.jinja").write_text("{{ messages[0].content }}")
    other = ("export", "runs/other", "--form", "adapter", "--to", "hub:me/taken")

    code, _, err = hub.run(*other)
    assert code == 2
    assert "me/taken: has other content (chat_template.jinja, loss.png, manifest.json" in one_line(
        err
    )
    assert hub.files("me/taken") == first

    code, out, err = hub.run(*other, "--revision", "v2", "--overwrite", "--json")
    assert code == 0, err
    assert json.loads(out)["removed"] == ["loss.png"]
    assert hub.files("me/taken") == first, "the other branch stays"
    assert hub.files("me/taken", "v2").keys() == first.keys() - {"loss.png"}

    code, _, err = hub.run(*ADAPTER, "hub:me/taken", "--private")
    assert code == 2
    assert "everybody can read this repository, and --private asks for the opposite" in one_line(
        err
    )


@pytest.mark.slow
def test_an_export_is_pushed_as_it_is(hub: Hub, assets: Path) -> None:
    # What has no adapter in it is pushed as it was written, such as a merged model.
    stories = str(assets / "models" / "stories260K")
    code, _, err = hub.run("quantize", "--model", stories, "--to", "out/packed")
    assert code == 0, err
    code, _, err = hub.run("export", "out/packed", "--to", "hub:me/packed")
    assert code == 0, err
    folder = hub.home / "out/packed"
    assert hub.files("me/packed") == {path.name: sha256(path) for path in folder.iterdir()}
    code, _, err = hub.run("export", "me/packed", "--to", "out/none")
    assert code == 2
    assert "me/packed: no adapter_config.json there; expected the repository of a LoRA" in err
    code, _, err = hub.run("export", "out/packed", "--to", "hub:me/packed", "--license", "mit")
    assert code == 2
    assert "--license: out/packed is an export that is made" in one_line(err)
    (folder / "config.json").write_text("{}")
    code, _, err = hub.run("export", "out/packed", "--to", "hub:me/packed")
    assert code == 3
    assert "config.json: changed since it was written" in one_line(err)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("token", "target", "code", "line"),
    [
        (None, "hub:me/no", 3, "me/no: no token for the hub; expected one that may write"),
        (WRONG, "hub:me/no", 3, "me/no: the hub does not accept the token"),
        (READER, "hub:me/no", 3, "me/no: the token has no right to write here"),
        (WRITER, "hub:you/no", 3, "you/no: the token has no right to write here"),
        (WRITER, "hub:no", 2, "--to: found 'hub:no'; expected hub:owner/name"),
        (WRITER, "hub:me/no@v1", 2, "pass --revision v1"),
    ],
)
def test_who_may_not_push_is_told_in_one_line(
    hub: Hub, token: str | None, target: str, code: int, line: str
) -> None:
    found, out, err = hub.run(*ADAPTER, target, "--json", token=token)
    assert (found, out) == (code, "")
    assert line in one_line(err)
    assert "hf_" not in err, "no token is ever shown"
    assert "me/no" not in hub.state()["repositories"]


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        ({"fail": {"batch": [403, "Private repository storage limit reached"]}}, 3, "no storage"),
        ({"fail": {"commit": [507, "Insufficient Storage"]}}, 3, "no storage left on the hub"),
        ({"fail": {"commit": [412, "A commit has happened since"]}}, 3, "was changed meanwhile"),
        ({"fail": {"tree": [400, f"bad {WRITER}"]}}, 3, "(bad [redacted])"),
        ({"damage": "adapter_config.json"}, 5, "the hub has other bytes after the push"),
    ],
    ids=["quota of files", "quota of commits", "race", "secret", "damaged"],
)
def test_each_fault_of_the_hub_is_one_line(
    hub: Hub, fault: dict[str, object], code: int, line: str
) -> None:
    hub.set(**fault)
    found, _, err = hub.run(*ADAPTER, "hub:me/fault", "--overwrite", "--json")
    assert found == code
    assert line in one_line(err)
    assert "hf_" not in err


def test_a_hub_that_is_out_of_reach_is_one_line(hub: Hub) -> None:
    address, hub.address = hub.address, "http://127.0.0.1:9"
    try:
        pushed = hub.run(*ADAPTER, "hub:me/far", "--json")
        pulled = hub.run("evaluate", "--adapter", "me/far")
    finally:
        hub.address = address
    assert pushed[0] == pulled[0] == 3
    assert "me/far: the hub is out of reach" in one_line(pushed[2])
    assert "me/far: no such folder; as a hub id, me/far: the model hub" in one_line(pulled[2])


def test_options_without_a_meaning_are_refused(hub: Hub) -> None:
    code, _, err = hub.run(*ADAPTER, "out/x", "--private", "--dtype", "float32")
    assert code == 2
    assert "error: --private: belongs to --to hub:owner/name" in err
    assert "error: --dtype: belongs to --form merged" in err


# ---------------------------------------------------------------- pulling


@pytest.mark.slow
def test_training_from_an_adapter_of_the_hub_pins_its_commit(hub: Hub) -> None:
    code, out, err = hub.run(*ADAPTER, "hub:me/start", "--json")
    assert code == 0, err
    commit = json.loads(out)["commit"]
    train = ("train", "--data", "my.jsonl", "--output", "runs/next", "--samples", "0")
    code, _, err = hub.run(
        *train, "--adapter", "hub:me/start", "--max-steps", "2", "--batch-size", "2"
    )
    assert code == 0, err
    stored = yaml.safe_load((hub.home / "runs/next/training_config.yaml").read_text())
    assert stored["adapter"] == f"hub:me/start@{commit}"
    # The commit is here, so going on needs no hub.
    address, hub.address = hub.address, "http://127.0.0.1:9"
    try:
        code, _, err = hub.run(*train, "--resume", "--max-steps", "3")
    finally:
        hub.address = address
    assert code == 0, err
    code, out, err = hub.run(
        "export", "me/start", "--to", "out/merged", "--verify-tokens", "0", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["report"]["adapter"] == f"hub:me/start@{commit}"


def test_a_run_that_is_spelt_wrongly_is_no_question_to_the_hub(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert HubName.of_adapter("runs/mime") is None
        assert HubName.of_adapter("owner/name") == HubName("owner/name")
        assert HubName.of_adapter("owner/name@v1") == HubName("owner/name", "v1")
        assert HubName.of_adapter("hub:runs/mime") == HubName("runs/mime")
    for text in ("mine", "/owner/name", "../name", "a/b/c", "./a", "a/b@../c", "~/mine"):
        assert HubName.of_adapter(text) is None
    for text in ("hub:x", "hub:a/b/c", "hub:a--b/c", "hub:a/" + "n" * 97):
        with pytest.raises(ConfigError, match="expected hub:owner/name"):
            HubName.of_adapter(text)


def test_a_snapshot_is_named_by_its_commit() -> None:
    snapshot = Path("/cache/models--owner--some-name/snapshots") / ("a" * 40)
    assert pinned_name(snapshot) == f"hub:owner/some-name@{'a' * 40}"
    assert pinned_name(Path("runs/mine")) == "runs/mine"


def test_pushing_an_adapter_needs_no_torch() -> None:
    imported = "qlora_kit.recipe, qlora_kit.export.push, qlora_kit.export.adapter_folder"
    told = run_python(f"import {imported}\nprint('torch' in sys.modules)")
    assert told.strip() == "False"


@pytest.mark.parametrize("text", [None, "no front\n", "---\na: [\n---\n", "---\n- 1\n---\n"])
def test_a_card_that_is_none_decides_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert front_of(tmp_path) == ForHub()
