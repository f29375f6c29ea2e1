"""ManifoldAdam on two processes (gloo, on the CPU): DDP with the matrices shared out, and FSDP2."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from lipfast.models import lipnext
from lipfast.optim import ManifoldAdam, parameter_groups

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
STEPS = 7


def network():
    torch.manual_seed(0)
    return lipnext((1, 4, 4), 3, depth=2, width=8, patch=2)


def images(step):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(8, 1, 4, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def train(model, optimizer, part, steps=range(STEPS)):
    for step in steps:
        x, y = (t[part] for t in images(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x) * 10, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def alone():
    model = network()
    train(model, ManifoldAdam(parameter_groups(model), lr=0.02, lookahead=3, retraction=4), slice(None))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(model, want):
    for name, p in model.named_parameters():
        got = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(got.detach(), want[name.removeprefix("module.")], rtol=0, atol=1e-4, msg=name)


def ddp(rank, half, want):
    model = nn.parallel.DistributedDataParallel(network())
    settings = {"lr": 0.02, "lookahead": 3, "retraction": 4, "process_group": dist.group.WORLD}
    optimizer = ManifoldAdam(parameter_groups(model), **settings)
    train(model, optimizer, half, range(4))
    again = ManifoldAdam(parameter_groups(model), **settings)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, again, half, range(4, STEPS))
    again.retract()
    sizes = [len(again.state[p]["exp_avg"]) for p in again.param_groups[0]["params"]]
    assert sum(sizes) == 2, sizes  # half of the four matrices
    assert_same(model, want)
    three = nn.Parameter(torch.eye(3).repeat(3, 1, 1))
    with pytest.raises(ValueError, match="process_group must have a size that divides the number of 3 x 3 matrices, 3, got 2"):
        ManifoldAdam([{"params": [three], "orthogonal": True}], process_group=dist.group.WORLD)


def fsdp(rank, half, want):
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model[2])
    fully_shard(model)
    optimizer = ManifoldAdam(parameter_groups(model), lr=0.02, lookahead=3, retraction=4)
    train(model, optimizer, half, range(4))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, half, range(4, STEPS))
    assert_same(model, want)
    moments = optimizer.state[model[2].rotation]["exp_avg"]
    assert moments.to_local().shape == (1, 8, 8)
    before = model[2].mixing.to_local().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        if rank == 1:
            model[2].mixing.to_local().mul_(2)  # only this process sees it, and all refuse
    with pytest.raises(ValueError, match=r"of 2.mixing must be orthogonal"):
        optimizer.step()
    if rank == 0:
        assert torch.equal(model[2].mixing.to_local(), before)
    inside = nn.Linear(4, 4, bias=False)
    nn.init.orthogonal_(inside.weight)
    fully_shard(inside)
    with pytest.raises(ValueError, match=r"weight must be sharded into whole matrices.*stack the matrices as \(N, d, d\)"):
        ManifoldAdam([{"params": [("weight", inside.weight)], "orthogonal": True}])


def process(rank, kind, store, want):
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        kind(rank, slice(4 * rank, 4 * rank + 4), want)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", [ddp, fsdp], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(kind, tmp_path):
    multiprocessing.spawn(process, (kind, str(tmp_path / "store"), alone()), nprocs=2)
