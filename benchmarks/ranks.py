"""`python -m benchmarks.ranks`: two ranks that take steps of a job, reduced by Horovod or by torch's DDP, over gloo.

Started plainly, the two ranks are started and the first one's figures printed; as one of them, it takes the steps.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.link import ADDRESSES
from pipelines import compression, net, training
from pipelines.job import Job
from pipelines.sampler import Share
from pipelines.training import FIT, Data, Worker

WARM_UP = 20  # steps
NICENESS = 10  # as `penstock train` has it
Step = Callable[[Share, float], None]


def launch(arguments: Sequence[str], second: Sequence[str]) -> None:
    """Start rank 0 here and rank 1 by the command `second` (empty: here too); raises CalledProcessError."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.gloo_run import create_run_env_vars, create_slot_env_vars
    from horovod.runner.http.http_server import RendezvousServer

    from benchmarks.rig import process

    address, interfaces = (ADDRESSES[0], ("v0", "v1")) if second else ("127.0.0.1", ("lo", "lo"))
    slots = get_host_assignments(parse_hosts("a:1,b:1" if second else "localhost:2"), 2)
    server = RendezvousServer(0)
    port = server.start()
    server.init(slots)
    with socket.socket() as probe:
        probe.bind((address, 0))
        free = probe.getsockname()[1]
    ranks = []
    for rank, (slot, interface) in enumerate(zip(slots, interfaces, strict=True)):
        horovod = create_slot_env_vars(slot) | create_run_env_vars(address, [interface], port)
        ddp = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": address, "MASTER_PORT": free}
        own = horovod | ddp | {"GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": 1}
        command = [*(second if rank else ()), sys.executable, "-m", "benchmarks.ranks", *arguments]
        ranks.append((command, {**os.environ, **{name: str(value) for name, value in own.items()}}))
    with process(*ranks[1], stdout=sys.stderr) as other, process(*ranks[0]) as first:
        for child in (first, other):
            if child.wait(600):
                raise subprocess.CalledProcessError(child.returncode, child.args)
    server.stop()


def horovod_step(job: Job) -> tuple[Step, Data, net.Net]:
    """A step as `penstock train` takes it."""
    training.hvd.init()
    worker = Worker(job)
    worker.state.sync()
    worker.model.train()
    return worker.step, worker.data, worker.model


def ddp_step(job: Job) -> tuple[Step, Data, net.Net]:
    """The same step with torch's DistributedDataParallel, which averages where ours sums."""
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo")
    recipe, data = job.recipe, Data(job, torch.device("cpu"))
    torch.manual_seed(job.seed)
    model = net.Net(job.inputs, len(job.targets), recipe.members, recipe.hidden, recipe.trees)
    model.forward = model.foretell  # type: ignore[method-assign]
    optimizer = net.make_optimizer(model, recipe.weight_decay)
    distributed = DistributedDataParallel(model, forward_sync_buffers=False)

    def step(share: Share, rate: float) -> None:
        tensors, truth = model.tensors(data.examples.inputs.take(share.rows)), data.truth[torch.from_numpy(share.rows)]
        optimizer.zero_grad()
        loss = net.losses(distributed(*tensors), truth, recipe.target_weight) @ torch.from_numpy(share.weights)
        torch.autograd.backward(loss * (2 / share.total))
        net.step(model, optimizer, rate)

    return step, data, model


def timed(step: Step, data: Data, rank: int, steps: int) -> float:
    """Seconds that so many steps took after the first few, which aren't counted."""
    sampler, began = data.samplers[FIT], 0.0
    order = sampler.order(0)
    for at in range(WARM_UP + steps):
        if at == WARM_UP:
            began = time.perf_counter()
        start = at * 2 * sampler.batch % (sampler.rows - 2 * sampler.batch)
        step(sampler.share(order, start, start + 2 * sampler.batch, rank, 2), 1e-4)
    return time.perf_counter() - began


def bytes_per_step(job: Job) -> int:
    """What a rank hands over for a step's exchange."""
    model = net.Net(job.inputs, len(job.targets), job.recipe.members, job.recipe.hidden, 0)
    gradients, sent = [torch.zeros_like(p) for p in model.parameters()], []
    compressor = compression.make(job.recipe.compression, gradients, 0)
    compressor.reduce(gradients, lambda tensors, name: sent.extend(t.nbytes for t in tensors))
    return sum(sent)


def take_steps(peer: str, job: Job, steps: int) -> None:
    """What a rank does; rank 0 prints the figures."""
    rank = int(os.environ["RANK"])
    os.nice(NICENESS)
    torch.set_num_threads(1)
    step, data, model = horovod_step(job) if peer == "horovod" else ddp_step(job)
    seconds = timed(step, data, rank, steps)
    if rank == 0:
        weights = torch.cat([p.detach().flatten() for p in model.parameters()]).double().norm().item()
        counts = {"steps": steps, "examples": steps * 2 * job.recipe.batch, "bytes": bytes_per_step(job)}
        print(json.dumps({"seconds": seconds, "weights": weights, **counts}))
    sys.stdout.flush()
    training.hvd.shutdown() if peer == "horovod" else torch.distributed.destroy_process_group()


def main() -> None:
    """`benchmarks.ranks PEER JOB.json STEPS [COMMAND OF RANK 1]...`"""
    peer, job, steps, *second = sys.argv[1:]
    if "RANK" in os.environ:
        take_steps(peer, Job.load(Path(job)), int(steps))
    else:
        launch([peer, job, steps], second)


if __name__ == "__main__":
    main()
