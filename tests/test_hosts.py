"Two processes on one machine are two hosts: they train to the numbers of one, save one checkpoint together, and one can go on alone."
import json, os, shutil, socket, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from rlhf_lab.runs import Run

root = Path(__file__).resolve().parent.parent
SMALL = dict(rank=2, top_layers=1, batch_size=4, max_length=64, precision='float32', save_every=2, learning_rate=1e-2, holdout=0.)
PAIRS = [dict(prompt=f'The film {i}', chosen=f' was a joy {i}.', rejected=f' was a bore, a bore {i}.') for i in range(16)]
TRAIN = '''
import json, sys
from rlhf_lab.mesh import join_hosts
assert join_hosts() == (len(sys.argv) > 2)
import jax
from rlhf_lab.practise import PPOConfig, train_ppo
from rlhf_lab.prefer import DPOConfig, train_dpo
from rlhf_lab.reward import RewardConfig, train_reward
from rlhf_lab.sft import SFTConfig, train_sft
stages = dict(sft=(SFTConfig, train_sft), dpo=(DPOConfig, train_dpo), reward=(RewardConfig, train_reward), ppo=(PPOConfig, train_ppo))
for name, settings in json.loads(sys.argv[1]).items():
    config, train = stages[name]
    train(config(**settings))
'''

def start(settings: dict, processes: int = 1, devices: int = 1) -> list:
    "Processes that train, one after another, what is in `settings`."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(os.environ, XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}', JAX_PLATFORMS='cpu')
    where = lambda i: dict(RLHF_LAB_COORDINATOR=f'127.0.0.1:{port}', RLHF_LAB_PROCESSES=str(processes), RLHF_LAB_PROCESS=str(i)) if processes > 1 else {}
    return [subprocess.Popen([sys.executable, '-c', TRAIN, json.dumps(settings), *['many'][:processes - 1]], cwd=root, env=env | where(i), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(processes)]

def finish(processes: list, status: int = 0) -> list[str]:
    said = [p.communicate(timeout=900) for p in processes]
    assert [p.returncode for p in processes] == [status]*len(processes), '\n'.join(err[-3000:] for _, err in said)
    return [out for out, _ in said]

def stages(folder: Path, toy: str, *names: str, **more) -> dict:
    "The settings of a few tiny runs in `folder`."
    folder.mkdir(exist_ok=True)
    rows = dict(sft=[dict(prompt=r['prompt'], completion=r['chosen']) for r in PAIRS], ppo=[dict(prompt=r['prompt']) for r in PAIRS])
    settings = {}
    for name in names:
        file = folder/f'{name}.jsonl'
        file.write_text(''.join(json.dumps(row) + '\n' for row in rows.get(name, PAIRS)))
        settings[name] = dict(SMALL, model=toy, data=str(file), out=str(folder/name)) | more
        if name == 'ppo': settings[name] |= dict(reward=str(folder/'reward'), batch_size=8, steps=3, minibatches=2, max_new_tokens=5, kl_stop=0.)
    return settings

def alike(a: Path, b: Path, steps: int):
    "Two runs measured the same."
    left, right = Run(a).metrics(), Run(b).metrics()
    assert [row['step'] for row in left] == [row['step'] for row in right] == list(range(1, steps + 1)), (a, b)
    for one, two in zip(left, right):
        assert set(one) == set(two)
        for name in one: assert one[name] == pytest.approx(two[name], rel=1e-3, abs=2e-5), (name, one['step'])

@pytest.mark.slow
@pytest.mark.parametrize('processes, devices', [(1, 4), (2, 1), (2, 2)])
def test_more_devices_or_processes_train_to_the_same_numbers(toy, tmp_path, processes, devices):
    names, mesh = ('sft', 'dpo', 'reward', 'ppo'), {4: 'data=2,fsdp=2', 1: '', 2: 'data=2,tensor=2'}[devices]
    finish(start(stages(tmp_path/'one', toy, *names)))
    told = finish(start(stages(tmp_path/'many', toy, *names, mesh=mesh), processes, devices))
    for name, steps in zip(names, (4, 4, 4, 3)):
        alike(tmp_path/'one'/name, tmp_path/'many'/name, steps)
        assert json.loads((tmp_path/'many'/name/'config.json').read_text())['mesh'] == mesh
        assert (tmp_path/'many'/name/'model/model.safetensors').exists()

@pytest.mark.parametrize('before, after', [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_another_number_of_processes_can_go_on(toy, tmp_path, before, after):
    "All is saved after steps 2 and 4; without the last checkpoint, a resumed run lives through steps 3 and 4 again."
    finish(start(stages(tmp_path, toy, 'sft'), before))
    out = tmp_path/'sft'
    seen = Run(out).metrics()
    assert [f.name for f in Run(out).checkpoints()] == ['2', '4'] and len(seen) == 4
    shutil.rmtree(out/'checkpoints/4')
    finish(start(stages(tmp_path, toy, 'sft', resume=True), after))
    assert [f.name for f in Run(out).checkpoints()] == ['2', '4']
    for one, two in zip(seen, Run(out).metrics(), strict=True):
        for name in one: assert one[name] == pytest.approx(two[name], rel=1e-3, abs=2e-5), (name, one['step'])

@pytest.mark.slow
def test_what_stops_the_first_process_stops_all(toy, tmp_path):
    settings = stages(tmp_path, toy, 'sft')
    Path(settings['sft']['out']).mkdir()
    (tmp_path/'sft/metrics.jsonl').write_text('')
    both = start(settings, 2)
    said = [p.communicate(timeout=300)[1] for p in both]
    assert all(p.returncode for p in both) and 'already holds a run' in said[0] and 'the first process has failed' in said[1], said
