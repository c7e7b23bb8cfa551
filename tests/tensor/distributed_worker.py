"""What each of several processes does in tests/test_distributed.py, which also imports it for the same in one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gblr_plugin as gblr
from gblr_plugin.layers.distributed_parameters import full_tensor
from gblr_plugin.tensor.distributed import ComponentParallel, component_part, frozen_weights, keep_frozen_local

STEPS, HALFWAY = 14, 6


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 25), nn.Tanh(), nn.Linear(25, 12)).double()
    layers = gblr.prepare(model)
    goal = gblr.LayerGoal(0.4, group="all")
    return model, gblr.StructureLearner(layers, dict.fromkeys(layers, goal), gblr.Schedule(2, 9))


def batch(step, rank=0, world=1):
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (16, 12))
    return x.chunk(world)[rank], y.chunk(world)[rank]


def optimizer_of(model):
    return torch.optim.AdamW(gblr.param_groups(model, lr=3e-2, weight_decay=0.1))


def train(module, learner, optimizer, start, stop, rank=0, world=1):
    losses = []
    for step in range(start, stop):
        x, y = batch(step, rank, world)
        loss = (module(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    total = torch.stack(losses)
    if world > 1:
        dist.all_reduce(total)
    return total / world


def state_of(model, learner):
    return {
        "parameters": {name: full_tensor(parameter) for name, parameter in model.named_parameters()},
        "costs": [layer.stored for layer in learner.layers.values()],
        "frozen": learner.frozen,
        "relative_flops": learner.relative_flops,
    }


def sharded(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp(rank, world, folder):
    model, learner = make()
    module = DistributedDataParallel(model)  # plain: no find_unused_parameters
    optimizer = optimizer_of(module)
    learner.attach_all([optimizer])
    losses = train(module, learner, optimizer, 0, STEPS, rank, world)
    assert learner.frozen
    before = [layer.widths.clone() for layer in learner.layers.values()]
    learner.detach()
    assert not any(layer.widths.requires_grad for layer in learner.layers.values())
    assert all(torch.equal(a, layer.widths) for a, layer in zip(before, learner.layers.values(), strict=True))
    return {"losses": losses, **state_of(model, learner)}


def ddp_of_one_frozen_before(rank, world, folder):
    """A structure that was frozen before the wrapper was made, trained on."""
    model, learner = make()
    optimizer = optimizer_of(model)
    learner.attach_all([optimizer])
    train(model, learner, optimizer, 0, STEPS)
    module = DistributedDataParallel(model)
    losses = train(module, learner, optimizer, STEPS, STEPS + 2, rank, world)
    return {"losses": losses, **state_of(model, learner)}


def fsdp2(rank, world, folder):
    model, learner = make()
    sharded(model)
    optimizer = optimizer_of(model)
    learner.attach_all([optimizer])
    first = train(model, learner, optimizer, 0, HALFWAY, rank, world)
    save(model, optimizer, learner, folder / "checkpoint")
    last = train(model, learner, optimizer, HALFWAY, STEPS, rank, world)
    return {"losses": torch.cat([first, last]), **state_of(model, learner)}


def save(model, optimizer, learner, path):
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states, "learner": learner.state_dict()}, checkpoint_id=path)


def resume(model, optimizer, learner, path):
    weights, states = get_state_dict(model, optimizer)
    learner.begin()
    content = {"model": weights, "optimizer": states, "learner": learner.state_dict()}
    dcp.load(content, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    learner.load_state_dict(content["learner"])


def fsdp2_resumed(rank, world, folder):
    torch.manual_seed(1)
    model, learner = make()
    sharded(model)
    optimizer = optimizer_of(model)
    learner.attach_all([optimizer])
    resume(model, optimizer, learner, folder / "checkpoint")
    train(model, learner, optimizer, HALFWAY, STEPS, rank, world)
    return state_of(model, learner)


def converted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 12)).double()
    gblr.prepare(model, settings=gblr.LayerSettings("pursuit", budget=0.6))
    return gblr.convert(model)


def fine_tuned(module, model, rank, world):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = train(module, None, optimizer, 0, 3, rank, world)
    biases = {name: full_tensor(p) for name, p in model.named_parameters() if name.endswith("bias")}
    return {"losses": losses, "biases": biases}


def frozen_ddp(rank, world, folder):
    model = converted()
    return fine_tuned(DistributedDataParallel(keep_frozen_local(model)), model, rank, world)


def frozen_fsdp2(rank, world, folder):
    model = converted()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)), ignored_params=set(frozen_weights(model).values()))
    return fine_tuned(model, model, rank, world)


def frozen_tensor_parallel(rank, world, folder):
    model = converted()
    mesh = init_device_mesh("cpu", (world,))
    share = component_part(model[0].weight.data, rank, world).stored / model[0].weight.stored
    parallelize_module(model, mesh, {"0": ComponentParallel(), "2": ComponentParallel()})
    x = batch(0)[0].requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return {"output": y.detach(), "gradient": x.grad, "bias": model[0].full_bias.grad, "share": share}


SCENARIOS = (
    ddp,
    ddp_of_one_frozen_before,
    fsdp2,
    fsdp2_resumed,
    frozen_ddp,
    frozen_fsdp2,
    frozen_tensor_parallel,
)


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    results = {scenario.__name__: scenario(rank, world, folder) for scenario in SCENARIOS}
    torch.save(results, folder / f"results{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
