"""Under FSDP2, on two processes, every kind of adapter trains as it does on one."""

import copy

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import spectune
import tiny

METHODS = ["svf", "lora:rank=4", "dora:inner=pissa,rank=4", "svft:pattern=random,width=2"]
METHODS += ["adalora:rank=2,total_steps=3,interval=1"]


def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(**tiny.batch("llama")).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def compare(rank, folder):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for method in METHODS:
        torch.manual_seed(0)
        alone = spectune.adapt(tiny.llama().bfloat16(), method)
        sharded = copy.deepcopy(alone)
        mesh = dist.init_device_mesh("cpu", (2,))
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        expected = train(alone)
        torch.testing.assert_close(train(sharded), expected, rtol=1e-4, atol=1e-4)
        assert len(set(expected)) > 1
    dist.destroy_process_group()
    (folder / f"done-{rank}").touch()


def test_two_processes(tmp_path):
    mp.spawn(compare, args=(tmp_path,), nprocs=2)
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
