"""The states of a run, taken and given back by themselves: what goes on, what stays this run's, what is refused."""

import pytest
import torch
import torch.nn as nn
from torch.optim.lr_scheduler import LambdaLR

import spectune
from spectune import SpectuneError
from spectune.storage import save_tensors
from spectune.training.trainer.checkpoint_files import OPTIMIZER, SCHEDULER, STATE
from spectune.training.trainer.states import (
    adapter_state,
    optimizer_state,
    put_adapter_state,
    put_optimizer_state,
    set_rates,
)


def halving(step):
    return 0.5**step


def run(lr=0.1, decay=0.0, shapes=((3, 4), (5,)), groups=1):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    parts = [{"params": part} for part in ([parameters] if groups == 1 else [parameters[:1], parameters[1:]])]
    optimizer = torch.optim.AdamW(parts, lr=lr, weight_decay=decay)
    return parameters, optimizer, LambdaLR(optimizer, halving)


def step(parameters, optimizer, schedule, times=1):
    for _ in range(times):
        optimizer.zero_grad()
        sum(p.square().sum() for p in parameters).backward()
        optimizer.step()
        schedule.step()


def write(folder, optimizer, schedule):
    torch.save(optimizer_state(optimizer), folder / OPTIMIZER)
    torch.save(schedule.state_dict(), folder / SCHEDULER)
    return str(folder)


def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole = run()
    step(*whole, 4)
    first = run()
    step(*first, 2)
    place = write(tmp_path, *first[1:])
    second = run()
    for ours, theirs in zip(second[0], first[0], strict=True):
        ours.data.copy_(theirs.data)
    put_optimizer_state(*second[1:], place)
    step(*second, 2)
    assert all(torch.equal(a, b) for a, b in zip(second[0], whole[0], strict=True))


def test_rates_and_decay_are_this_runs_where_the_schedule_is(tmp_path):
    old = run(lr=0.1, decay=0.3)
    step(*old, 2)
    parameters, optimizer, schedule = run(lr=0.02, decay=0.7)
    put_optimizer_state(optimizer, schedule, write(tmp_path, *old[1:]))
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.7
    assert group["lr"] == pytest.approx(0.02 * 0.25) == schedule.get_last_lr()[0]
    step(parameters, optimizer, schedule)
    assert group["lr"] == pytest.approx(0.02 * 0.125)


def test_a_new_base_rate_holds_at_once():
    _, optimizer, schedule = run()
    schedule.base_lrs = [0.4]
    set_rates(schedule)
    assert optimizer.param_groups[0]["lr"] == 0.4


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"groups": 2}, "other groups of parameters"),
        ({"shapes": ((3, 4), (6,))}, r"is \(5,\) there, and its parameter \(6,\) here"),
    ],
)
def test_another_run_is_told(tmp_path, other, said):
    old = run()
    step(*old)
    place = write(tmp_path, *old[1:])
    with pytest.raises(SpectuneError, match=said):
        put_optimizer_state(*run(**other)[1:], place)


@pytest.mark.parametrize("name", [OPTIMIZER, SCHEDULER])
def test_what_is_no_state_is_damage(tmp_path, name):
    place = write(tmp_path, *run()[1:])
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(SpectuneError, match="is damaged"):
        put_optimizer_state(*run()[1:], place)


def adapted(rank=2):
    return spectune.adapt(nn.Sequential(nn.Linear(4, 3)), f"lora:rank={rank}")


def test_adapters_get_their_tensors_back_and_the_base_keeps_its_own(tmp_path):
    old, new = adapted(), adapted()
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.add_(1.0)
    base = new[0].weight.detach().clone()
    save_tensors(adapter_state(old), tmp_path / STATE)
    put_adapter_state(new, str(tmp_path))
    assert adapter_state(new).keys() == adapter_state(old).keys()
    assert all(torch.equal(tensor, adapter_state(old)[key]) for key, tensor in adapter_state(new).items())
    assert torch.equal(new[0].weight, base)


def test_tensors_of_other_settings_are_refused_before_any_is_written(tmp_path):
    save_tensors(adapter_state(adapted(3)), tmp_path / STATE)
    model = adapted()
    before = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    with pytest.raises(SpectuneError, match=r"float32 \(3, 4\) there and torch.float32 \(2, 4\) here"):
        put_adapter_state(model, str(tmp_path))
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_state(model).items())
    save_tensors(adapter_state(spectune.adapt(nn.Sequential(nn.Linear(4, 3)), "svf")), tmp_path / STATE)
    with pytest.raises(SpectuneError, match="it differs in"):
        put_adapter_state(model, str(tmp_path))
    (tmp_path / STATE).write_bytes(b"")
    with pytest.raises(SpectuneError, match="is damaged"):
        put_adapter_state(model, str(tmp_path))
