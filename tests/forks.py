"""What the kill tests run in children: forked by a server that has imported PyTorch once, since importing it takes
longer than all that is tested. Children of multiprocessing find this module by name."""

import json
import os
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch


def server(*more: str):
    "A fork server that has the package (and `more` modules) in memory already."
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "stable_diffusion_scratch.recipe", *more])
    return context


def make_recipe(config: str, folder: str, lines: Connection) -> None:
    "Make the recipe, saving after every step; says so in a byte per step."
    from stable_diffusion_scratch.recipe import make

    torch.set_num_threads(1)
    for _ in make(json.loads(config), folder, every=0.0):
        lines.send_bytes(b".")


def sine_run(steps: int, **options):
    "A perceptron that learns a sine, with two averages."
    from stable_diffusion_scratch.training import Run, warmup_cosine

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4))

    def loss(model, generator):
        x = torch.randn(16, 4, generator=generator)
        return ((model(x) - x.sin()) ** 2).mean()

    return Run(net, loss, warmup_cosine(1e-2, steps, 5), **{"widths": (0.05, 0.1)} | options)


def train_small(steps: int, path: str, lines: Connection) -> None:
    "Fit the sine with everything that writes: checkpoints, snapshots, a table."
    from stable_diffusion_scratch.training import fit, to_csv

    torch.set_num_threads(1)
    for _ in to_csv(fit(sine_run(steps), steps, path, every=0.0, snapshots=7), f"{path}.csv"):
        lines.send_bytes(b".")


def train_together(
    rank: int, count: int, port: int, path: str, steps: int, out: str, stop_in: int | None = None
) -> None:
    "One of `count` processes that Accelerate joins through Gloo; writes losses and weights."
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    import threading

    from accelerate import Accelerator

    from stable_diffusion_scratch.distributed import fit_together

    torch.set_num_threads(1)
    accelerator, stop = Accelerator(), threading.Event()
    assert accelerator.num_processes == count and accelerator.process_index == rank
    run = sine_run(30, parts=4)
    if rank:  # what another process holds at first must not matter
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(rank)
    for report in fit_together(run, steps, path, accelerator, stop):
        if rank == count - 1 and report.step == stop_in:
            stop.set()
    weights = torch.cat([p.detach().flatten() for p in [*run.model.parameters(), *run.powers[0].values()]])
    torch.save({"losses": run.losses, "weights": weights, "step": run.step}, f"{out}-{rank}.pt")
    accelerator.end_training()  # leaves the process group
