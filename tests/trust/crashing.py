"""A process that has torch loaded and forks children to be killed: a kill costs milliseconds, not an import.

Reads one JSON request a line from standard input, ``{"job", "folder", "kill_after", "fault"}``; forks a child that does
the job in the folder, under a fault of the disk where one is named; kills it with SIGKILL after so many seconds, unless
that is null; answers with one line, ``{"killed", "code", "seconds"}``. What it printed is in the folder's name + .log.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin.utils.files import write_atomic

STEPS, EVERY = 36, 3
LIBC = ctypes.CDLL(None, use_errno=True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Dropout(0.2), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(48, 16, generator=generator), torch.randint(4, (48,), generator=generator)


class Order:
    """Endless batches in an order drawn anew each epoch; its state is where it stands."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.left: list[int] = []

    def next(self) -> list[int]:
        if not self.left:
            self.left = torch.randperm(48, generator=self.generator).tolist()
        batch, self.left = self.left[:8], self.left[8:]
        return batch

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state(), "left": self.left}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])
        self.left = list(state["left"])


def finish(folder: Path, model: nn.Module, **more: object) -> None:
    write_atomic(folder / "done.pt", lambda file: torch.save({"model": model.state_dict(), **more}, file))


def plain(folder: Path, rank: int = 0, world: int = 1) -> None:
    """A loop of one's own: everything that moves is in one file, written whole or not at all.

    With two processes under DDP each has half of every batch, and dropout is left out: there each draws for itself.
    """
    model, order = network(), Order()
    layers = gblr.prepare(model)
    model[1].p = 0.2 if world == 1 else 0.0
    optimizer = torch.optim.AdamW(gblr.param_groups(model, lr=1e-2))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    goals = {name: gblr.LayerGoal(budget=0.3, group=0) for name in layers}
    learner = gblr.StructureLearner(layers, goals, gblr.Schedule(4, 24), compact=True)
    learner.attach_all([optimizer])
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "learner": learner, "order": order}
    step, file = 0, folder / "last.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        step = state["step"]
    # Wrapped when it is what it was: parameters of a structure that is frozen and compact are others.
    whole = model if world == 1 else nn.parallel.DistributedDataParallel(model)
    x, y = examples()
    while step < STEPS:
        batch = order.next()[rank::world]
        optimizer.zero_grad()
        nn.functional.cross_entropy(whole(x[batch]), y[batch]).backward()
        optimizer.step()
        scheduler.step()
        step += 1
        if step % EVERY == 0 and rank == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "random": torch.get_rng_state()}
            write_atomic(file, lambda out, state=state: torch.save(state, out))
    if rank == 0:
        finish(folder, model, learner=learner.state_dict(), optimizer=optimizer.state_dict())


def together(folder: Path, job: Callable[[Path, int, int], None]) -> None:
    """In two processes; the second goes when the first, which is killed, is no more."""
    meeting = folder / f"meeting-{os.getpid()}"
    other = os.fork()
    rank = 0 if other else 1
    if rank == 1:
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    job(folder, rank, 2)
    torch.distributed.barrier()
    if rank == 1:
        os._exit(0)
    os.waitpid(other, 0)


def pair(folder: Path) -> None:
    """The loop of one's own under DDP."""
    together(folder, plain)


def shards(folder: Path) -> None:
    """A loop under FSDP2: sharded checkpoints in folders, which get their names when they are complete."""
    together(folder, sharded)


def sharded(folder: Path, rank: int, world: int) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    from gblr_plugin.layers.distributed_parameters import full_tensor

    model, order = network(), Order()
    layers = gblr.prepare(model)
    model[1].p = 0.0
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    for layer in layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(gblr.param_groups(model, lr=1e-2))
    goals = {name: gblr.LayerGoal(budget=0.3, group=0) for name in layers}
    learner = gblr.StructureLearner(layers, goals, gblr.Schedule(4, 24))
    learner.attach_all([optimizer])

    def content() -> dict:
        weights, states = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": states, "learner": learner.state_dict(), "order": order.state_dict()}

    step, saved = 0, sorted(folder.glob("steps-*"))
    if saved:
        step = int(saved[-1].name.removeprefix("steps-"))
        state = content()
        dcp.load(state, checkpoint_id=saved[-1])
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        learner.load_state_dict(state["learner"])
        order.load_state_dict(state["order"])
    x, y = examples()
    while step < STEPS:
        batch = order.next()[rank::world]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        step += 1
        if step % EVERY == 0:
            dcp.save(content(), checkpoint_id=folder / "unfinished")
            if rank == 0:
                (folder / "unfinished").rename(folder / f"steps-{step:04d}")
            torch.distributed.barrier()
    ended = {name: full_tensor(parameter) for name, parameter in model.named_parameters()}
    if rank == 0:
        write_atomic(folder / "done.pt", lambda out: torch.save({"model": ended, "learner": learner.state_dict()}, out))


def lightning(folder: Path) -> None:
    """A Trainer with the callback; data come from the module, which keeps their order and random numbers itself."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.order, self.random = network(), Order(), None

        def training_step(self, batch: object, index: int) -> torch.Tensor:
            if self.random is not None:  # Lightning draws random numbers itself where it resumes
                torch.set_rng_state(self.random)
                self.random = None
            rows = self.order.next()
            x, y = examples()
            return nn.functional.cross_entropy(self.net(x[rows]), y[rows])

        def train_dataloader(self) -> DataLoader:
            return DataLoader(TensorDataset(torch.zeros(STEPS)), batch_size=1)

        def configure_optimizers(self) -> object:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def on_save_checkpoint(self, checkpoint: dict) -> None:
            checkpoint["order"], checkpoint["random"] = self.order.state_dict(), torch.get_rng_state()

        def on_load_checkpoint(self, checkpoint: dict) -> None:
            self.order.load_state_dict(checkpoint["order"])
            self.random = checkpoint["random"]

    fit(folder, Module())


def epochs(folder: Path) -> None:
    """The same with a shuffled loader and a validation, and nothing in the module that knows of checkpoints."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
            self.net(batch[0])

        def train_dataloader(self) -> DataLoader:
            return DataLoader(TensorDataset(*examples()), batch_size=12, shuffle=True)  # 4 steps an epoch

        def val_dataloader(self) -> DataLoader:
            return DataLoader(TensorDataset(*examples()), batch_size=24)

        def configure_optimizers(self) -> object:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS // 4)]

    fit(folder, Module())


def fit(folder: Path, module: Any) -> None:
    """Train a LightningModule with the callback and Lightning's own checkpoints, or go on from the last of these."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint

    callback = gblr.lightning.GBLRCallback(budget=0.3, warmup=4, cooldown=24, compact=True)
    saver = ModelCheckpoint(dirpath=folder / "steps", filename="{step:04d}", every_n_train_steps=EVERY, save_top_k=-1)
    torch.manual_seed(3)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[callback, saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    saved = sorted((folder / "steps").glob("*.ckpt"))
    trainer.fit(module, ckpt_path=saved[-1] if saved else None, weights_only=True)
    finish(folder, module, learner=callback.learner.state_dict(), optimizer=trainer.optimizers[0].state_dict())


TASK = """
import torch
from torch import nn

from gblr_plugin.tasks.base import ClassifierModule, PairsDataModule


class Task:
    metric, higher_is_better, layers = "accuracy", True, ["network.*"]

    def network(self):
        return nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 2))

    def module(self, network, training, steps):
        return ClassifierModule(network, training, self.metric, steps)

    def data(self, seed, batch_size):
        x = torch.randn(96, 8, generator=torch.Generator().manual_seed(seed))
        pairs = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        train, held_out = torch.utils.data.random_split(pairs, [64, 32], torch.Generator().manual_seed(seed))
        return PairsDataModule(train, held_out, batch_size, seed)

    def example_input(self, batch=1):
        return torch.zeros(batch, 8)
"""
CONFIG = """
task: killed_task:Task
seeds: [0]
dense: {epochs: 2, batch_size: 16}
finetune: {epochs: 2, batch_size: 16}
methods: [{name: gblr}, {name: low_rank}]
"""


def commanded(folder: Path, name: str, more: str) -> None:
    """`gblr NAME` on a small task of its own."""
    from gblr_plugin.cli import main

    (folder / "killed_task.py").write_text(TASK)
    (folder / "config.yaml").write_text(CONFIG + more)
    os.chdir(folder)
    code = main([name, "config.yaml", "--output", "out"])
    if code:
        raise SystemExit(code)
    (folder / "done.pt").touch()


def run(folder: Path) -> None:
    commanded(folder, "run", "latency_batch: [1]\nconfig_list: [{op_names: [network.0], sparse_ratio: 0.3}]\n")


def compare(folder: Path) -> None:
    commanded(folder, "compare", "budgets: [0.7]\nconfig_list: [{op_names: [network.0]}]\n")


def compress(folder: Path) -> None:
    from gblr_plugin.huggingface.compress_folder import CompressSettings, compress_folder

    out = folder / "out"
    if (out / "config.json").exists() and not list(out.glob(".*/task.json")):  # killed after the last of it
        (folder / "done.pt").touch()
        return
    compress_folder(folder.parent / "dense", folder / "out", CompressSettings(0.5, method="trapezoid"))
    (folder / "done.pt").touch()


def converted(width: int) -> nn.Module:
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(width, width))
    gblr.prepare(model)
    for layer in model:
        layer.freeze_structure()
    return gblr.convert(model)


def small(folder: Path) -> None:
    gblr.save(converted(16), folder / "model.safetensors")


def large(folder: Path) -> None:
    gblr.save(converted(256), folder / "model.safetensors")


def command(folder: Path) -> None:
    """`gblr compress`, whose line on standard error goes to the log."""
    from gblr_plugin.cli import main

    raise SystemExit(
        main(
            [
                "compress",
                str(folder.parent / "dense"),
                "--budget",
                "0.5",
                "--method",
                "trapezoid",
                "--output",
                str(folder / "out"),
            ]
        )
    )


JOBS = {
    job.__name__: job for job in (plain, pair, shards, lightning, epochs, run, compare, compress, small, large, command)
}

# -- faults ------------------------------------------------------------------------------------------------------------

BIND, REMOUNT_BIND_READ_ONLY, PRIVATE = 0x1000, 0x1 | 0x20 | 0x1000, 0x4000 | 0x40000


def mount(source: bytes, target: bytes, kind: bytes | None, flags: int, data: bytes | None = None) -> None:
    if LIBC.mount(source, target, kind, flags, data):
        raise OSError(ctypes.get_errno(), "mount")


def read_only(folder: Path) -> None:
    """In a mount namespace of this process alone: the superuser writes through any permissions."""
    if LIBC.unshare(0x20000):
        raise OSError(ctypes.get_errno(), "unshare")
    mount(b"none", b"/", None, PRIVATE)
    place = str(folder).encode()
    mount(place, place, None, BIND)
    mount(place, place, None, REMOUNT_BIND_READ_ONLY)


def file_size(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is an error then
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def full_disk(folder: Path) -> None:
    """The folder as a disk of 64 kB with what was in it, written back when the process ends."""
    earlier = {path.name: path.read_bytes() for path in folder.iterdir()}
    if LIBC.unshare(0x20000):
        raise OSError(ctypes.get_errno(), "unshare")
    mount(b"none", b"/", None, PRIVATE)
    behind = os.open(folder, os.O_RDONLY)
    mount(b"none", str(folder).encode(), b"tmpfs", 0, b"size=64k")
    for name, content in earlier.items():
        (folder / name).write_bytes(content)

    def copy_back() -> None:
        for path in folder.iterdir():
            out = os.open(path.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, dir_fd=behind)
            os.write(out, path.read_bytes())

    AFTER.append(copy_back)


AFTER: list = []
FAULTS = {fault.__name__: fault for fault in (read_only, file_size, full_disk)}
CANNOT = 77  # exit code where this system does not let us make the fault


def child(job: str, folder: Path, fault: str | None) -> None:
    os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    if fault is not None:
        try:
            FAULTS[fault](folder)
        except OSError:
            os._exit(CANNOT)
    code = 0
    try:
        JOBS[job](folder)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    for after in AFTER:
        after()
    sys.stdout.flush()
    os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)  # so that a fork has all the threads there are
    for line in sys.stdin:
        request = json.loads(line)
        sys.stdout.flush()
        begun = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(request["job"], Path(request["folder"]), request.get("fault"))
        if request["kill_after"] is not None:
            time.sleep(request["kill_after"])
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        answer = {
            "killed": os.WIFSIGNALED(status),
            "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "seconds": time.monotonic() - begun,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        __import__(name)
    print("ready", flush=True)
    serve()
