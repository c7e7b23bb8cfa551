"""What each of two processes does in tests/lightning/test_distributed.py: one Trainer with DDP, one with FSDP2."""

from __future__ import annotations

import os
import sys

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import gblr_plugin as gblr
from gblr_plugin.layers.distributed_parameters import full_tensor
from gblr_plugin.lightning import GBLRCallback

try:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
except ImportError:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 25), nn.Tanh(), nn.Linear(25, 12)).double()

    def training_step(self, batch, index):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-2)


class Sharded(Plain):
    def configure_model(self):
        if not isinstance(self.net[0], gblr.GBLRLayer):
            gblr.prepare(self)
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class Noisy(Plain):
    """Each process drops its own."""

    def training_step(self, batch, index):
        return super().training_step((nn.functional.dropout(batch[0], 0.3), batch[1]), index)


def fit(module, strategy, folder, saver=None, path=None, initialiser="svd"):
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        *(torch.randn(64, n, generator=generator, dtype=torch.float64) for n in (16, 12))
    )
    options = {"initialiser": initialiser, "picture_every_n_epochs": 0}
    callback = GBLRCallback(budget=0.4, warmup=2, cooldown=8, **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=3,
        callbacks=[callback, *([saver] if saver else [])],
        logger=False,
        enable_checkpointing=saver is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=isinstance(module, Noisy))
    trainer.fit(module, loader, ckpt_path=path, weights_only=True)
    assert callback.learner.frozen
    return {
        "relative_flops": callback.learner.relative_flops,
        "steps": callback.learner.step_count,
        "parameters": {name: full_tensor(parameter) for name, parameter in module.named_parameters()},
    }


def going_on(folder, rank):
    """From the second step of the second epoch, with other random numbers to begin with."""
    strategy = DDPStrategy(process_group_backend="gloo")
    torch.manual_seed(10 + rank)
    whole_one = fit(
        Noisy(), strategy, folder, ModelCheckpoint(f"{folder}/steps", "{step}", every_n_train_steps=6, save_top_k=-1)
    )
    torch.manual_seed(99)
    strategy = DDPStrategy(process_group_backend="gloo")
    resumed = fit(Noisy(), strategy, folder, path=f"{folder}/steps/step=6.ckpt")
    return {"whole": whole_one["parameters"], "resumed": resumed["parameters"]}


def main(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # as torchrun sets them
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {
        "ddp": fit(Plain(), DDPStrategy(process_group_backend="gloo"), folder),
        "dense first": fit(Noisy(), DDPStrategy(process_group_backend="gloo"), folder, initialiser="dense"),
        "fsdp2": fit(Sharded(), ModelParallelStrategy(2, 1, process_group_backend="gloo"), folder),
    }
    results["going on"] = going_on(folder, rank)
    torch.save(results, f"{folder}/results{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads of Lightning's own groups may abort an interpreter that ends the long way


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
