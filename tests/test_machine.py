"What `rlhf-lab doctor` says of a machine and of a run."
import pytest
from rlhf_lab import machine
from rlhf_lab.cli import main
from rlhf_lab.machine import MachineConfig, advice, examine_run, run_config

TINY = dict(batch_size=4, max_length=16, precision='float32', steps=3600)

def test_the_machine_alone(capsys):
    assert main(['doctor']) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == {'devices', 'memory', 'disk', 'cores', 'python', 'jax', 'flax', 'optax'} and 'GB free' in lines['disk']

def test_a_run_that_does_not_fit_is_told_what_to_change(toy, monkeypatch):
    monkeypatch.setattr(machine, 'free_memory', lambda: 1000)
    monkeypatch.setattr(machine, 'probe', lambda *_: pytest.fail('nothing is run that does not fit'))
    said = examine_run(MachineConfig(toy, **TINY))
    assert 'does not fit' in said and 'remat' in said and 'bfloat16' in said and 'top_layers' not in said.split('Change')[0]

def test_advice_follows_from_what_is_set():
    tips = lambda **how: ' '.join(advice(run_config(MachineConfig(**dict(how))), 1e9, 8e9, 4e9, 30))
    assert 'accumulate 4' in tips(batch_size=16) and 'accumulate' not in tips(batch_size=1)
    assert 'remat' not in tips(remat=True) and 'rank 16' in tips(rank=0) and 'top_layers 7' in tips(top_layers=0)
    assert 'accumulate 4' in tips(method='ppo', batch_size=16, minibatches=4)

@pytest.mark.slow
@pytest.mark.parametrize('method', ['sft', 'reward', 'dpo', 'ppo'])
def test_every_method_can_be_tried_out(toy, method):
    said = examine_run(MachineConfig(toy, method, **TINY | dict(max_length=32, max_new_tokens=4, minibatches=2)))
    seconds = float(said.split('\n')[1].split()[0])
    hours = float(said.split()[-2])
    assert 'it fits' in said and hours == pytest.approx(seconds, abs=.02)
