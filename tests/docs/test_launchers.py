"""The files of docs/launchers/ run, and torchrun and the kit accept the commands that result.

Stand-ins take the place of the programs of a cluster.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import PROJECT, run
from torch.distributed.run import parse_args

LAUNCHERS = PROJECT / "docs" / "launchers"
NAMED = {"MODEL": "demo", "DATA": "/shared/my rows.jsonl", "OUTPUT": "/shared/runs/mine"}
# The programs of a cluster, which are not here. Each notes how it was called. `srun` starts its
# command once a node and hands signals on, as the real one does; `torchrun` waits for one if asked.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, signal, subprocess, sys, time

name, given = pathlib.Path(sys.argv[0]).name, sys.argv[1:]

def note(what):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(json.dumps([name, what]) + "\\n")

note(given)
if name == "scontrol" and given[0] == "show":
    print("first-node\\nsecond-node")
elif name == "srun":
    command = given[next(i for i, each in enumerate(given) if not each.startswith("--")):]
    nodes = [
        subprocess.Popen(command, env={{**os.environ, "SLURM_NODEID": str(node)}})
        for node in range(int(os.environ["SLURM_NNODES"]))
    ]
    signal.signal(signal.SIGTERM, lambda *_: [node.terminate() for node in nodes])
    sys.exit(max(node.wait() for node in nodes))
elif name == "torchrun" and "WAITS" in os.environ:
    signal.signal(signal.SIGTERM, lambda *_: (note("terminated"), sys.exit(1)))
    note("waits")
    time.sleep(60)
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a shell that finds the stand-ins."""
    for name in ("torchrun", "srun", "scontrol"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(STAND_IN)
        program.chmod(0o755)
    plain = {name: os.environ[name] for name in ("HOME",) if name in os.environ}
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    return {**plain, **NAMED, "PATH": path, "CALLS": str(tmp_path / "calls")}


def calls(cluster: Mapping[str, str], program: str) -> list[Any]:
    file = Path(cluster["CALLS"])
    found = map(json.loads, file.read_text().splitlines()) if file.exists() else iter(())
    return [given for name, given in found if name == program]


def bash(
    cluster: Mapping[str, str], *command: str, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *command], env={**cluster, **more}, capture_output=True, text=True, check=False
    )


def accepted(call: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, dict[str, Any]]:
    """Return what torchrun understands of a call, and the configuration of the run it starts."""
    launch = parse_args(call)
    assert (launch.module, launch.training_script) == (True, "qlora_kit")
    assert launch.training_script_args[0] == "train"
    code, out, err = run(*launch.training_script_args, "--dry-run", "--json", capsys=capsys)
    assert code == 0, err
    config: dict[str, Any] = json.loads(out)
    assert config["resume"] == "latest", "it goes on where it was started before"
    return launch, config


# ---------------------------------------------------------------- torchrun


def test_one_node(cluster: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    done = bash(cluster, str(LAUNCHERS / "torchrun_one_node.sh"), "--rank", "32")
    assert done.returncode == 0, done.stderr
    (call,) = calls(cluster, "torchrun")
    launch, config = accepted(call, capsys)
    assert (launch.standalone, launch.nproc_per_node) == (True, "gpu")
    assert (config["model"], config["rank"]) == ("demo", 32)
    assert config["data"] in (NAMED["DATA"], [NAMED["DATA"]])


def test_several_nodes(cluster: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    script = str(LAUNCHERS / "torchrun_nodes.sh")
    for rank in ("0", "1"):
        place = {"NODES": "2", "NODE_RANK": rank, "MASTER_ADDR": "10.0.0.1", "GPUS": "4"}
        assert bash(cluster, script, **place).returncode == 0
    first, second = (accepted(call, capsys) for call in calls(cluster, "torchrun"))
    for rank, (launch, _) in enumerate((first, second)):
        assert (launch.nnodes, launch.node_rank, launch.nproc_per_node) == ("2", rank, "4")
        assert (launch.master_addr, launch.master_port) == ("10.0.0.1", 29500)
    assert first[1] == second[1]


@pytest.mark.parametrize("script", ["torchrun_one_node.sh", "torchrun_nodes.sh", "slurm.sh"])
def test_what_is_not_named_is_said(cluster: dict[str, str], script: str) -> None:
    place = {"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"}
    missing = {name: value for name, value in cluster.items() if name != "DATA"}
    done = bash(missing, str(LAUNCHERS / script), **place)
    assert done.returncode != 0
    assert "DATA: name the data" in done.stderr
    assert not calls(cluster, "torchrun")


def real_torchrun(tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    """Start the script of one node with the torchrun of this environment, on one process."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "two", "completion": "2"}\n' * 4)
    named = {
        "MODEL": "demo", "DATA": str(data), "OUTPUT": str(tmp_path / "run"), "GPUS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(LAUNCHERS / "torchrun_one_node.sh"), *options], env={**os.environ, **named},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(running: subprocess.Popen[str]) -> str:
    """Return what a process that ends well has printed."""
    out, err = running.communicate()
    assert running.returncode == 0, err
    return out + err


def test_the_real_torchrun_hands_the_options_on(tmp_path: Path) -> None:
    out, _ = real_torchrun(tmp_path, "--max-steps", "3", "--dry-run", "--json").communicate()
    found = json.loads(out)
    assert (found["model"], found["max_steps"], found["resume"]) == ("demo", 3, "latest")


_QUICK = ("--samples", "0", "--val-size", "0", "--max-length", "64")


@pytest.mark.slow
def test_the_same_command_begins_and_goes_on(tmp_path: Path) -> None:
    begun = ended(real_torchrun(tmp_path, "--max-steps", "1", *_QUICK))
    assert "no checkpoint yet; starting from the beginning" in begun
    assert "checkpoint-1" in ended(real_torchrun(tmp_path, "--max-steps", "2", *_QUICK))
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    weights = tmp_path / "run" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    ended(real_torchrun(tmp_path, "--max-steps", "2", *_QUICK))
    assert weights.stat().st_mtime_ns == before, "a run that has ended is left as it is"


@pytest.mark.slow
def test_a_machine_that_is_taken_away_saves_a_checkpoint(tmp_path: Path) -> None:
    steps = ("--max-steps", "100000", "--save-steps", "100000")
    running = real_torchrun(tmp_path, *steps, *_QUICK)
    log = tmp_path / "run" / "trainer_log.jsonl"
    _wait_for(lambda: log.is_file() and log.read_text().count("\n") > 3, seconds=300)
    running.terminate()
    out, err = running.communicate(timeout=120)
    assert running.returncode != 0
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"saved {saved}" in out + err


# ---------------------------------------------------------------- Slurm

SLURM = {"SLURM_JOB_ID": "70007", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "[first,second]-node"}


def slurm_options() -> dict[str, str]:
    """Return the options of the job, as sbatch reads them: until the first command."""
    found = {}
    for line in (LAUNCHERS / "slurm.sh").read_text().splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[name] = value
    return found


def test_a_slurm_job(cluster: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    text = (LAUNCHERS / "slurm.sh").read_text()
    options = slurm_options()
    assert len(options) == text.count("#SBATCH"), "sbatch reads all of them"
    assert (options["nodes"], options["ntasks-per-node"]) == ("2", "1")
    assert {"requeue", "gpus-per-node", "time"} <= options.keys()
    script = str(LAUNCHERS / "slurm.sh")
    done = bash(cluster, script, "--rank", "32", **SLURM, SLURM_CPUS_PER_TASK="64")
    assert done.returncode == 0, done.stderr
    assert calls(cluster, "scontrol") == [["show", "hostnames", "[first,second]-node"]]
    both = [accepted(call, capsys) for call in calls(cluster, "torchrun")]
    assert sorted(launch.node_rank for launch, _ in both) == [0, 1]
    for launch, config in both:
        assert (launch.nnodes, launch.nproc_per_node) == ("2", "gpu")
        assert (launch.master_addr, launch.master_port) == ("first-node", 20000 + 70007 % 20000)
        assert config["rank"] == 32
        assert config["data"] in (NAMED["DATA"], [NAMED["DATA"]])


@pytest.fixture
def job(cluster: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a job of Slurm whose training waits for a signal."""
    script = str(LAUNCHERS / "slurm.sh")
    running = subprocess.Popen(
        ["bash", script], env={**cluster, **SLURM, "WAITS": "1"}, start_new_session=True
    )
    try:
        _wait_for(lambda: calls(cluster, "torchrun").count("waits") == 2)
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def test_a_job_whose_time_is_over_queues_itself_again(
    cluster: dict[str, str], job: subprocess.Popen[bytes]
) -> None:
    name = slurm_options()["signal"].removeprefix("B:").partition("@")[0]
    job.send_signal(getattr(signal, f"SIG{name}"))
    assert job.wait(timeout=30) == 0
    assert calls(cluster, "torchrun").count("terminated") == 2, "both nodes may save"
    assert calls(cluster, "scontrol")[-1] == ["requeue", "70007"]


def test_a_cancelled_job_is_not_queued_again(
    cluster: dict[str, str], job: subprocess.Popen[bytes]
) -> None:
    job.terminate()
    assert job.wait(timeout=30) == -signal.SIGTERM
    assert not [given for given in calls(cluster, "scontrol") if given[0] == "requeue"]


def _wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.05)


# ---------------------------------------------------------------- Kubernetes


def kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((LAUNCHERS / "kubernetes.yaml").read_text())
    return service, job


def test_a_kubernetes_job(capsys: pytest.CaptureFixture[str]) -> None:
    service, job = kubernetes()
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    (program,) = container["command"]
    assert program == "torchrun"
    launch, _ = accepted(_expanded(container["args"], {"JOB_COMPLETION_INDEX": "1"}), capsys)
    assert launch.node_rank == 1
    assert int(launch.nnodes) == spec["completions"] == spec["parallelism"]
    assert int(launch.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    # Pod 0 is found through the service, which selects the pods of the job.
    assert spec["completionMode"] == "Indexed"
    assert launch.master_addr == f"{name}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["ports"][0]["port"] == launch.master_port
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def _expanded(arguments: list[str], variables: dict[str, str]) -> list[str]:
    """Return arguments with $(NAME) replaced, as the kubelet does."""
    return [re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], each) for each in arguments]


def test_kubernetes_own_schema_has_every_field() -> None:
    schema = pytest.importorskip(
        "kubernetes_validate", reason="needs kubernetes-validate: pip install -e '.[test]'"
    )
    for resource in kubernetes():
        schema.validate(resource, "1.37", strict=True)
    _, job = kubernetes()
    job["spec"]["completionsMode"] = job["spec"].pop("completionMode")
    with pytest.raises(schema.ValidationError, match="completionsMode"):
        schema.validate(job, "1.37", strict=True)


def test_a_trainjob_of_kubeflow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (PROJECT / "docs" / "scale.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    trainer = yaml.safe_load(block)["spec"]["trainer"]
    program, *call = trainer["command"]
    assert program == "torchrun"
    # The variables that Kubeflow sets for torchrun.
    for name, value in {
        "NNODES": trainer["numNodes"], "NPROC_PER_NODE": trainer["numProcPerNode"],
        "NODE_RANK": 1, "MASTER_ADDR": "node-0", "MASTER_PORT": 29400,
    }.items():  # fmt: skip
        monkeypatch.setenv(f"PET_{name}", str(value))
    launch, _ = accepted([*call, *trainer["args"]], capsys)
    assert (launch.nnodes, launch.nproc_per_node) == ("2", "8")
    assert (int(launch.node_rank), launch.master_addr) == (1, "node-0")


# ---------------------------------------------------------------- SkyPilot


def test_a_skypilot_task(cluster: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    task = yaml.safe_load((LAUNCHERS / "skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] is True
    (bucket,) = task["file_mounts"]
    assert all(task["envs"][name].startswith(f"{bucket}/") for name in ("DATA", "OUTPUT"))
    nodes = {
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1",
    }  # fmt: skip
    done = bash(cluster, "-c", task["run"], **nodes, **task["envs"])
    assert done.returncode == 0, done.stderr
    (call,) = calls(cluster, "torchrun")
    launch, config = accepted(call, capsys)
    assert (launch.nnodes, launch.node_rank, launch.nproc_per_node) == ("2", 1, "8")
    assert launch.master_addr == "10.0.0.1"
    assert (config["model"], config["output"]) == (task["envs"]["MODEL"], task["envs"]["OUTPUT"])


@pytest.mark.slow
def test_skypilot_itself_reads_the_task(tmp_path: Path) -> None:
    pytest.importorskip("sky", reason="needs skypilot, which no extra of the kit installs")
    read = "import sky, sys; print(sky.Task.from_yaml(sys.argv[1]).num_nodes)"
    done = subprocess.run(
        [sys.executable, "-c", read, str(LAUNCHERS / "skypilot.yaml")],
        env={**os.environ, "HOME": str(tmp_path)}, cwd=PROJECT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "2"


# ---------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def ray_train() -> Any:
    spec = importlib.util.spec_from_file_location("ray_train", LAUNCHERS / "ray_train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_of_ray_train(ray_train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (shown,) = re.findall(r"^    python ray_train\.py (.*?)\n\n", ray_train.__doc__, re.M | re.S)
    given = ray_train._arguments(shlex.split(shown.replace("\\\n", " ")))
    assert (given.nodes, given.gpus_per_node) == (2, 8)
    command = ray_train.torchrun_command(1, 2, "10.0.0.1", 29511, 8, given.options)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    launch, config = accepted(command[3:], capsys)
    assert (launch.nnodes, launch.node_rank, launch.nproc_per_node) == ("2", 1, "8")
    assert (launch.master_addr, launch.master_port) == ("10.0.0.1", 29511)
    assert config["model"] == "llama-3.1-8b"


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_it_says_what_to_install(
    ray_train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ray_train.py", "--", "--model", "demo"])
    with pytest.raises(SystemExit, match=r"^error: .*ray.*; pip install 'ray\[train\]'$"):
        ray_train.main()


@pytest.mark.slow
def test_ray_itself_starts_two_nodes(tmp_path: Path) -> None:
    pytest.importorskip("ray.train", reason="needs ray[train], which no extra of the kit installs")
    done = subprocess.run(
        [
            sys.executable, str(LAUNCHERS / "ray_train.py"), "--nodes", "2", "--gpus-per-node", "0",
            "--cpus-per-node", "1", "--processes-per-node", "1", "--same-node",
            "--max-failures", "0", "--", "--model", "demo", "--output", str(tmp_path / "run"),
            "--resume", "--dry-run",
        ],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "model: demo" in done.stdout + done.stderr


# ---------------------------------------------------------------- the page


def test_every_file_stands_on_the_page() -> None:
    page = (PROJECT / "docs" / "scale.md").read_text(encoding="utf-8")
    for file in LAUNCHERS.iterdir():
        assert f"(launchers/{file.name})" in page, file.name


@pytest.mark.parametrize("script", sorted(LAUNCHERS.glob("*.sh")), ids=lambda path: path.name)
def test_bash_reads_every_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
