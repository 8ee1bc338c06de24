"A run that cannot be lost: killed anywhere, stopped by a signal or damaged on disk, it goes on to the very same end (T1–T8, W1, W2)."
import contextlib, json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, pytest
from rlhf_lab.core import CheckpointError, LabError
from rlhf_lab.practise import OnlineConfig, over, train_online, train_ppo
from rlhf_lab.ppo import PPOConfig
from rlhf_lab.prefer import DPOConfig, KTOConfig, train_dpo, train_kto
from rlhf_lab.reward import RewardConfig, train_reward
from rlhf_lab.runs import Run, seal
from rlhf_lab.sft import SFTConfig, train_sft

root = Path(__file__).resolve().parent.parent

def lengths(rollout): return np.asarray(rollout.mask.sum(1) + np.asarray(rollout.tokens).sum(1)%7, float)

PPO = dict(steps=6, minibatches=2, max_new_tokens=6, kl_target=.05, kl_horizon=40, kl_budget=.05, over_budget='rollback', kl_stop=0.)
METHODS = dict( # how each is trained: (config, train, its own settings)
    sft=(SFTConfig, train_sft, {}), reward=(RewardConfig, train_reward, {}), dpo=(DPOConfig, train_dpo, dict(ref_alpha=.6, ref_every=1)),
    kto=(KTOConfig, train_kto, {}), ppo=(PPOConfig, lambda config: train_ppo(config, lengths), dict(PPO, separate_critic=True)),
    online=(OnlineConfig, lambda config: train_online(config, lengths), dict(PPO, batch_size=8, minibatches=1)))

def rows_of(name: str) -> list:
    if name == 'sft': return [dict(prompt=f'The film {i}', completion=f' was a joy {i}.') for i in range(24)]
    return [dict(prompt=f'The film {i}', chosen=f' was a joy {i}.', rejected=f' was a bore, a bore {i}.') for i in range(24)]

def train(name: str, toy: str, out: Path, resume: bool = False):
    "Six updates of a method, with a checkpoint after every second one."
    config, run, own = METHODS[name]
    data = out.parent/f'{name}.jsonl'
    if not data.exists(): data.write_text(''.join(json.dumps(row) + '\n' for row in rows_of(name)))
    small = dict(model=toy, data=str(data), out=str(out), rank=2, top_layers=1, batch_size=4, max_length=64, precision='float32', save_every=2,
        learning_rate=1e-2, holdout=0., resume=resume)
    return run(config(**small | own))

def end_of(out: Path) -> dict:
    "What a finished run leaves, bit for bit: the whole state, every row, the model."
    run = Run(out)
    paper = json.loads((run.checkpoints()[-1]/'MANIFEST.json').read_text())
    assert [row['step'] for row in run.metrics()] == list(range(1, 7))
    return dict(state=paper['files'], arrays=paper['arrays'], rows=(out/'metrics.jsonl').read_bytes(), model=(out/'model/model.safetensors').read_bytes())

# ── dying at a chosen moment, without a process of its own ──

class Died(BaseException): "What a process does after `kill -9`: nothing."

class Death:
    "From its `at`-th change to a file in `folder` on, no file there is touched any more."
    hooked, folder = False, None

    @classmethod
    def hook(cls, event, args):
        if cls.folder is None or event not in ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'shutil.rmtree'): return
        if not isinstance(args[0], (str, os.PathLike)) or not str(args[0]).startswith(cls.folder): return
        cls.count += event != 'open' or bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        if cls.count >= cls.at: raise Died

    def __init__(self, folder: Path, at: int): self.where = str(folder), at

    def __enter__(self):
        Death.folder, Death.at, Death.count = *self.where, 0
        if not Death.hooked: sys.addaudithook(Death.hook); Death.hooked = True

    def __exit__(self, kind, *_):
        Death.folder = None
        return kind is not None and issubclass(kind, Died)

def a_tree(step: int) -> dict: return dict(w=jnp.full((3, 2), step, jnp.bfloat16), key=jax.random.key(step), at=dict(step=step, kl=.1*step))

def equal(a, b): return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b))

def lived(folder: Path, last: int, resume: bool = False):
    with Run(folder, {'lr': 1}, resume) as run:
        step, tree = run.restore(a_tree(0))
        for step in range(step + 1, last + 1):
            run.log(step, {'loss': 1/step})
            run.save(step, a_tree(step))

@pytest.mark.parametrize('again', [False, True], ids=['new', 'replaced'])
def test_dying_at_any_change_of_any_file_loses_at_most_the_step_at_hand(tmp_path, again):
    "Every moment of two saves: writing, renaming, deleting what is too old; and of a save over one that exists."
    base, run, died = tmp_path/'base', tmp_path/'run', 0
    lived(base, 3)
    for at in range(1, 999):
        shutil.copytree(base, run)
        with Death(run, at) as _:
            if again:
                with Run(run, {'lr': 1}, True) as held: held.save(3, a_tree(3))
            else: lived(run, 5, resume=True)
            died = at
        if died == at: break
        with Run(run, {'lr': 1}, True) as held:
            step, tree = held.restore(a_tree(0))
            assert step >= 3 and equal(tree, a_tree(step)), f'died at change {at}: step {step}'
            assert [row['step'] for row in held.metrics()] == list(range(1, step + 1)), at
            assert sorted(f.name for f in run.iterdir()) == ['checkpoints', 'config.json', 'metrics.jsonl', 'run.lock'], at
        lived(run, 5, resume=True)
        assert [row['step'] for row in Run(run).metrics()] == [1, 2, 3, 4, 5] and [f.name for f in (run/'checkpoints').iterdir()] in (['4', '5'], ['5', '4'])
        shutil.rmtree(run)
    assert died > 10

# ── every method, to the last bit ──

def at_log(monkeypatch, step: int, act):
    "Do something after the row of a step was logged."
    log = Run.log
    def logged(run, n, measured):
        log(run, n, measured)
        if n == step: act()
    monkeypatch.setattr(Run, 'log', logged)

def die(): raise Died

@pytest.mark.parametrize('name, end', [('sft', 'dies while saving'), ('reward', 'SIGTERM'), ('dpo', 'dies between saves'), ('ppo', 'Ctrl-C while sampling')])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(name, end, toy, tmp_path, monkeypatch):
    train(name, toy, tmp_path/'whole')
    half = tmp_path/'half'
    with monkeypatch.context() as patch:
        if end == 'dies while saving':
            at_log(patch, 4, lambda: setattr(Death, 'at', Death.count + 3))
            with Death(half, 10**9): train(name, toy, half)
            assert [f.name for f in Run(half).checkpoints()] == ['2'] and (half/'checkpoints/4.tmp').exists()
        elif end == 'dies between saves':
            at_log(patch, 5, die)
            with pytest.raises(Died): train(name, toy, half)
            assert Run(half).checkpoints()[-1].name == '4' and Run(half).metrics()[-1]['step'] == 5
        else:
            if name == 'ppo':
                calls = []
                def pressed(rollout):
                    calls.append(1)
                    if len(calls) == 4: signal.raise_signal(signal.SIGINT)
                    return lengths(rollout)
                patch.setitem(METHODS, 'ppo', (PPOConfig, lambda config: train_ppo(config, pressed), METHODS['ppo'][2]))
            else: at_log(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(KeyboardInterrupt): train(name, toy, half)
            assert Run(half).checkpoints()[-1].name == '3' and Run(half).metrics()[-1]['step'] == 3
            assert not (half/'model').exists()
    train(name, toy, half, resume=True)
    assert end_of(half) == end_of(tmp_path/'whole')

def test_what_a_checkpoint_of_ppo_holds(toy, tmp_path):
    "Parameters of policy and critic, optimizer, key, price of KL, the way back, the place: all of it moves."
    train('ppo', toy, tmp_path/'run')
    run = Run(tmp_path/'run')
    four, six = ((f/'arrays.bin', json.loads((f/'MANIFEST.json').read_text())) for f in run.checkpoints())
    names = ' '.join(six[1]['arrays'])
    for part in ("['params']['critic']", "['params']['policy']", "['opt_state']", "['key']", "['kl']['coef']", "['kl']['good']", "['origin']", "['data']"): assert part in names
    assert four[0].read_bytes() != six[0].read_bytes() and len({row['lab/kl_coef'] for row in run.metrics()}) > 3
    assert {row['lab/over_budget'] for row in run.metrics()} == {0, 1}
