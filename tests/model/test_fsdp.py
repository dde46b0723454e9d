"""Under FSDP2, on two processes, every kind of adapter trains as it does on one."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import spectune
import tiny

METHODS = ["svf", "lora:rank=4", "dora:inner=pissa,rank=4", "svft:pattern=random,width=2,gate=true"]
METHODS += ["adalora:rank=2,total_steps=3,interval=1,gamma=9"]
BESIDE = [{}] * len(METHODS)
METHODS += ["lora:rank=2"] * 4
BESIDE += [{"modules_to_save": m} for m in (["norm"], ["embed_tokens"], {"embed_tokens": [3, 7]})] + [{"bias": "all"}]


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def train(model):
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.01)
    for _ in range(4):
        model(**tiny.batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def compare(rank, folder):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for method, beside in zip(METHODS, BESIDE, strict=True):
        torch.manual_seed(0)
        alone = spectune.adapt(tiny.llama().bfloat16(), method, **beside)
        sharded = copy.deepcopy(alone)
        mesh = dist.init_device_mesh("cpu", (2,))
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        start = {n: p.detach().clone() for n, p in trained(alone).items()}
        train(alone)
        train(sharded)
        for name, parameter in trained(sharded).items():
            torch.testing.assert_close(parameter.full_tensor(), trained(alone)[name], rtol=1e-3, atol=1e-4)
        assert any((p - start[n]).abs().max() > 1e-3 for n, p in trained(alone).items())
        extracted, expected = spectune.extract(sharded), spectune.extract(alone)
        assert extracted.modules.keys() == expected.modules.keys()
        for name, (term,) in extracted.modules.items():
            torch.testing.assert_close(term.tensors, expected.modules[name][0].tensors, rtol=1e-3, atol=1e-4)
        if "embed_tokens" in beside.get("modules_to_save", ()) and isinstance(beside["modules_to_save"], dict):
            with pytest.raises(spectune.SpectuneError, match="rows of the sharded embedding"):
                spectune.merge(sharded)
    dist.destroy_process_group()
    (folder / f"done-{rank}").touch()


@pytest.mark.slow
def test_two_processes(tmp_path):
    mp.spawn(compare, args=(tmp_path,), nprocs=2)
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
