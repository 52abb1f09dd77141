r"""Train on the nodes of a Ray cluster, with Ray Train: one worker a node, one torchrun a worker.

    python ray_train.py --nodes 2 --gpus-per-node 8 -- \
        --model llama-3.1-8b --data /shared/my.jsonl --output /shared/runs/mine --resume

Behind `--` are the options of `qlora-kit train`. Ray gives each worker a working folder of its own,
so paths are absolute, and on storage that all nodes share. Where a worker or its node is lost, Ray
starts all workers again, and the run goes on from the last checkpoint. It needs `pip install
"ray[train]"`, and qlora-kit on every node.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from typing import Any

# What Ray sets for a worker that trains by itself. Here torchrun sets it for the processes that it
# starts; the device of this worker would be wrong for all of them but one.
_OF_RAYS_WORKER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR",
    "MASTER_PORT", "ACCELERATE_TORCH_DEVICE",
)  # fmt: skip


def main() -> None:
    """Start the workers, and wait for the end of the run."""
    arguments = _arguments()

    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        sys.exit(f"error: {error}; pip install 'ray[train]'")

    gpus = arguments.gpus_per_node
    settings = {
        "processes": arguments.processes_per_node or gpus,
        "options": arguments.options,
    }
    TorchTrainer(
        train_on_node,
        train_loop_config=settings,
        # Ray's own group of processes only brings the workers together; the training has its own.
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=arguments.nodes,
            use_gpu=gpus > 0,
            resources_per_worker={
                "CPU": arguments.cpus_per_node,
                **({"GPU": gpus} if gpus else {}),
            },
            # A worker each; on one machine, to try it, all of them.
            placement_strategy="SPREAD" if arguments.same_node else "STRICT_SPREAD",
        ),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=arguments.max_failures)),
    ).fit()


def _arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1)
    add("--gpus-per-node", type=int, default=8)
    add("--cpus-per-node", type=int, default=8)
    add("--processes-per-node", type=int, help="default: one a GPU")
    add("--max-failures", type=int, default=20, help="times that all workers are started again")
    add("--same-node", action="store_true", help="workers may share a node")
    add("options", nargs="+", help="options of `qlora-kit train`, behind --")
    return parser.parse_args(given)


def train_on_node(settings: dict[str, Any]) -> None:
    """Run torchrun in a worker of Ray, until the run ends.

    Args:
        settings: the number of `processes` of each node, and the `options` of `qlora-kit train`.

    Raises:
        subprocess.CalledProcessError: torchrun failed, here or, seen from here, on another node.
    """
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    context = get_context()
    rank = context.get_world_rank()
    here = (ray.util.get_node_ip_address(), _free_port()) if rank == 0 else None
    address, port = broadcast_from_rank_zero(here)
    command = torchrun_command(
        rank, context.get_world_size(), address, port, settings["processes"], settings["options"]
    )
    kept = {name: value for name, value in os.environ.items() if name not in _OF_RAYS_WORKER}
    subprocess.run(command, env=kept, check=True)


def torchrun_command(
    node_rank: int, nodes: int, address: str, port: int, processes: int, options: list[str]
) -> list[str]:
    """Return the command of a node; it is the same on each but for the rank."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--node-rank",
        str(node_rank), "--master-addr", address, "--master-port", str(port), "--nproc-per-node",
        str(processes), "-m", "qlora_kit", "train", *options,
    ]  # fmt: skip


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    main()
