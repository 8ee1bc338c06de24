"A run that cannot be lost: killed anywhere, stopped by a signal or damaged on disk, it goes on to the very same end (T1–T8, W1, W2)."
import contextlib, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, pytest
from rlhf_lab.core import CheckpointError, LabError
from rlhf_lab.practise import OnlineConfig, over, train_online, train_ppo
from rlhf_lab.ppo import PPOConfig
from rlhf_lab.prefer import DPOConfig, KTOConfig, train_dpo, train_kto
from rlhf_lab.reward import RewardConfig, train_reward
from rlhf_lab.runs import Run, defect, save_tree, seal
from rlhf_lab.sft import SFTConfig, train_sft

root = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module', autouse=True)
def compiled_once(tmp_path_factory):
    "Each method is trained several times here: what was compiled once is found again."
    from jax.experimental.compilation_cache import compilation_cache
    wanted = dict(jax_compilation_cache_dir=str(tmp_path_factory.mktemp('compiled')), jax_persistent_cache_min_compile_time_secs=0.)
    before = {name: getattr(jax.config, name) for name in wanted}
    for settings in (wanted, before):
        for name, value in settings.items(): jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is wanted: yield

def lengths(rollout): return np.asarray(rollout.mask.sum(1) + np.asarray(rollout.tokens).sum(1)%7, float)

PPO = dict(steps=6, minibatches=2, max_new_tokens=6, kl_target=.05, kl_horizon=40, kl_budget=.05, over_budget='rollback', kl_stop=0.)
METHODS = dict( # how each is trained: (config, train, its own settings)
    sft=(SFTConfig, train_sft, {}), reward=(RewardConfig, train_reward, {}), dpo=(DPOConfig, train_dpo, dict(ref_alpha=.6, ref_every=1)),
    kto=(KTOConfig, train_kto, dict(steps=6)), # a pair is two thumbs
    ppo=(PPOConfig, lambda config: train_ppo(config, lengths), dict(PPO, separate_critic=True)),
    online=(OnlineConfig, lambda config: train_online(config, lengths), dict(PPO, batch_size=8, minibatches=1)))

def rows_of(name: str, n: int = 24) -> list:
    if name == 'sft': return [dict(prompt=f'The film {i}', completion=f' was a joy {i}.') for i in range(n)]
    return [dict(prompt=f'The film {i}', chosen=f' was a joy {i}.', rejected=f' was a bore, a bore {i}.') for i in range(n)]

def train(name: str, toy: str, out: Path, resume: bool = False):
    "Six updates of a method, with a checkpoint after every second one."
    config, run, own = METHODS[name]
    data = out.parent/f'{name}.jsonl'
    if not data.exists(): data.write_text(''.join(json.dumps(row) + '\n' for row in rows_of(name)))
    small = dict(model=toy, data=str(data), out=str(out), rank=2, top_layers=1, batch_size=4, max_length=64, precision='float32', save_every=2,
        learning_rate=1e-2, holdout=0., resume=resume)
    return run(config(**small | own))

def bits(checkpoint: Path) -> dict:
    "Every array of a checkpoint as bytes; nobody says which there shall be."
    import orbax.checkpoint as ocp
    assert not defect(checkpoint)
    return {name: (str(x.dtype), x.shape, np.asarray(x).tobytes()) for name, x in ocp.PyTreeCheckpointer().restore(checkpoint).items()}

def end_of(out: Path) -> dict:
    "What a finished run leaves, bit for bit: the whole state, every row, the model."
    run = Run(out)
    assert [row['step'] for row in run.metrics()] == list(range(1, 7))
    return dict(state=bits(run.checkpoints()[-1]), rows=(out/'metrics.jsonl').read_bytes(), model=(out/'model/model.safetensors').read_bytes())

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

@pytest.mark.parametrize('again, stride', [pytest.param(again, stride, id=f'{"replaced" if again else "new"}, {stride}', marks=[pytest.mark.slow]*(stride == 1))
    for again in (False, True) for stride in (1, 12)])
def test_dying_at_any_change_of_any_file_loses_at_most_the_step_at_hand(tmp_path, again, stride):
    "Every moment of two saves: writing, renaming, deleting what is too old; and of a save over one that exists."
    base, run, died = tmp_path/'base', tmp_path/'run', 0
    lived(base, 3)
    for at in range(stride, 999, stride):
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
        left = Run(run).checkpoints()
        assert [row['step'] for row in Run(run).metrics()] == [1, 2, 3, 4, 5] and [f.name for f in left[-2:]] == ['4', '5'], at
        assert not any(map(defect, left)) and {*(run/'checkpoints').iterdir()} == {*left}, at
        shutil.rmtree(run)
    assert died > 20

# ── every method, to the last bit ──

def at_log(monkeypatch, step: int, act):
    "Do something after the row of a step was logged."
    log = Run.log
    def logged(run, n, measured):
        log(run, n, measured)
        if n == step: act()
    monkeypatch.setattr(Run, 'log', logged)

def die(): raise Died

def all_of_it_moves(out: Path):
    "Parameters of policy and critic, optimizer, price of KL, the way back, the place: all of it is there and moves; the key stays, and draws are made of it and the step."
    run = Run(out)
    four, six = map(bits, run.checkpoints())
    names = ' '.join(six)
    for part in ("['params']['critic']", "['params']['policy']", "['opt_state']", "['key']", "['kl']['coef']", "['kl']['good']", "['origin']", "['data']"): assert part in names
    moved = ' '.join(name for name in six if four[name] != six[name])
    for part in ("['params']['critic']", "['params']['policy']", "['opt_state']", "['step']", "['kl']['coef']"): assert part in moved
    assert len({row['lab/kl_coef'] for row in run.metrics()}) > 3
    assert {row['lab/over_budget'] for row in run.metrics()} == {0, 1}

@pytest.mark.parametrize('name, end', [('sft', 'dies while saving'), *(pytest.param(*case, marks=pytest.mark.slow) for case in
    (('reward', 'SIGTERM'), ('dpo', 'dies between saves'), ('ppo', 'Ctrl-C while sampling')))])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(name, end, toy, tmp_path, monkeypatch):
    train(name, toy, tmp_path/'whole')
    half = tmp_path/'half'
    with monkeypatch.context() as patch:
        if end == 'dies while saving':
            at_log(patch, 4, lambda: setattr(Death, 'at', Death.count + 3))
            with Death(half, 10**9): train(name, toy, half)
            assert [f.name for f in Run(half).checkpoints()] == ['2'] and [*(half/'checkpoints').glob('4.tmp*')]
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
    if name == 'ppo': all_of_it_moves(tmp_path/'whole')

# ── several updates that fail, a budget that is spent, a start that has changed ──

@pytest.mark.slow
def test_ten_broken_updates_in_a_row_stop_a_run_and_nothing_is_lost(toy, tmp_path, monkeypatch):
    "The last good parameters are saved; who goes on with the same numbers is stopped by the first."
    from rlhf_lab import sft
    loss = sft.sft_loss
    def breaks(model, batch): value, weight, measured = loss(model, batch); return value*jnp.where(batch.tokens.sum()%1 == 0, jnp.nan, 1), weight, measured
    monkeypatch.setattr(sft, 'sft_loss', breaks)
    (tmp_path/'sft.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows_of('sft', 72)))
    for resume, words, rows in ((False, '10 times in a row .step 10.', 10), (True, '11 times', 11)):
        with pytest.raises(LabError, match=words): train('sft', toy, tmp_path/'run', resume)
        run = Run(tmp_path/'run')
        assert [row['skipped'] for row in run.metrics()] == [1]*rows and run.checkpoints()[-1].name == str(rows)

def test_a_budget_that_is_spent_stays_spent(tmp_path):
    config = PPOConfig(kl_budget=2.)
    with Run(tmp_path) as run:
        assert not over(run, config)
        run.log(1, {'objective/kl': 2.5})
        assert over(run, config) and not over(run, PPOConfig(kl_budget=3.)) and not over(run, PPOConfig(kl_budget=2., over_budget='rollback'))

@pytest.mark.slow
def test_another_model_other_words_another_tokenizer(toy, tmp_path):
    "What a run began with is part of what it needs."
    from rlhf_lab.model import Transformer
    from rlhf_lab.tokens import train_tokenizer
    from rlhf_lab.weights import load_model, save_model
    train('sft', toy, tmp_path/'run')
    model, tokenizer = load_model(toy)
    save_model(Transformer(model.config, key=jax.random.key(9)), tokenizer, tmp_path/'other')
    save_model(model, train_tokenizer(['what the film was and the joy of it']*9, len(tokenizer)), tmp_path/'words')
    with pytest.raises(CheckpointError, match='started from other weights'): train('sft', str(tmp_path/'other'), tmp_path/'run', resume=True)
    with pytest.raises(CheckpointError, match='the tokenizer'): train('sft', str(tmp_path/'words'), tmp_path/'run', resume=True)
    (tmp_path/'sft.jsonl').write_text((tmp_path/'sft.jsonl').read_text().replace('film', 'firm'))
    with pytest.raises(CheckpointError, match='the data, the tokenizer'): train('sft', toy, tmp_path/'run', resume=True)

def test_a_judge_with_other_words_is_refused(toy, tmp_path):
    from rlhf_lab.reward import fresh_judge, judge_reward, save_judge
    from rlhf_lab.tokens import load_tokenizer, train_tokenizer
    judge, tokenizer = fresh_judge(RewardConfig(model=toy, rank=2, precision='float32'), jax.random.key(0))
    save_judge(judge, tokenizer, tmp_path/'judge', dict(pool='last'))
    judge_reward(tmp_path/'judge', tokenizer=load_tokenizer(toy))
    with pytest.raises(CheckpointError, match='reads other tokens than the policy writes'): judge_reward(tmp_path/'judge', tokenizer=train_tokenizer(['other'], 300))

# ── damage (T3): a sentence that names it, and the checkpoint before ──

def rewrite(paper: Path, change, sealed: bool = True):
    "A manifest that somebody wrote who knows how."
    manifest = json.loads(paper.read_text())
    manifest.pop('seal')
    change(manifest)
    paper.write_text(json.dumps(dict(manifest, **({'seal': seal(manifest)} if sealed else {}))))

def heart(folder: Path) -> Path:
    "The file where Orbax keeps the numbers."
    return max((f for f in folder.rglob('*') if f.parent.name == 'd'), key=lambda f: f.stat().st_size)

def linked(folder, older):
    file = heart(folder)
    file.unlink()
    file.symlink_to(heart(older))

def lies(folder, older):
    "Numbers of another shape than the manifest says, sealed by somebody who knows how."
    other = folder.with_name('lie')/folder.name
    save_tree(other, dict(a_tree(3), w=jnp.zeros((3, 5), jnp.bfloat16)))
    rewrite(other/'MANIFEST.json', lambda m: m['arrays'].update({"['w']": ['bfloat16', [3, 2]]}))
    shutil.rmtree(folder)
    other.rename(folder)
    other.parent.rmdir()

DAMAGE = dict( # what is done to checkpoint 3, with 2 beside it, and a word of the complaint
    nan=(lambda f, old: save_tree(f, dict(a_tree(3), w=jnp.full((3, 2), jnp.nan, jnp.bfloat16))), "['w'] is not finite"), lies=(lies, 'cannot be read'), step=(lambda f, old: (shutil.rmtree(f), shutil.copytree(old, f)), 'was written as 2, not as 3'),
    arrays_of_another_step=(lambda f, old: shutil.copy(heart(old), heart(f)), 'ocdbt.process_0/d/'), manifest_of_another_step=(lambda f, old: shutil.copy(old/'MANIFEST.json', f), 'was written as 2'),
    shape=(lambda f, old: rewrite(f/'MANIFEST.json', lambda m: m['arrays'].update({"['w']": ['bfloat16', [2, 3]]})), "['w'] is ['bfloat16', [2, 3]]"),
    dtype=(lambda f, old: rewrite(f/'MANIFEST.json', lambda m: m['arrays'].update({"['w']": ['float16', [3, 2]]})), "['w'] is ['float16'"),
    huge=(lambda f, old: rewrite(f/'MANIFEST.json', lambda m: m['arrays'].update({"['w']": ['bfloat16', [2**62, 2**62]]})), "['w'] is ['bfloat16', [4611"),
    seal=(lambda f, old: rewrite(f/'MANIFEST.json', lambda m: m.update(rows=0), sealed=False), 'MANIFEST.json: is damaged'),
    nested=(lambda f, old: (f/'MANIFEST.json').write_text('['*10**6), 'MANIFEST.json: is damaged'), words=(lambda f, old: (f/'MANIFEST.json').write_text('{"files": 3, "seal": 1}'), 'is damaged'),
    outside=(lambda f, old: rewrite(f/'MANIFEST.json', lambda m: m['files'].update({'../../../secret': [6, 'x']})), 'secret: is missing'),
    link=(linked, 'is a link'), link_beside=(lambda f, old: (f/'more').symlink_to('/etc'), 'is a link'),
    pipe=(lambda f, old: os.mkfifo(f/'pipe'), 'is a link or a device'), stranger=(lambda f, old: (f/'extra.pkl').write_bytes(b'x'), 'extra.pkl: is not in the manifest'))

@pytest.mark.parametrize('kind', DAMAGE)
def test_what_a_stranger_or_a_bad_disk_can_do_is_named(kind, tmp_path, capsys):
    act, words = DAMAGE[kind]
    (tmp_path/'secret').write_text('secret')
    lived(tmp_path/'run', 3)
    act(tmp_path/'run/checkpoints/3', tmp_path/'run/checkpoints/2')
    with Run(tmp_path/'run', {'lr': 1}, True) as run: step, tree = run.restore(a_tree(0))
    said = capsys.readouterr().err
    assert step == 2 and equal(tree, a_tree(2)) and words in said and said.endswith('; using step 2\n') and said.count('\n') == 1
    shutil.rmtree(tmp_path/'run/checkpoints/2')
    with pytest.raises(CheckpointError, match='no good checkpoint is left'): Run(tmp_path/'run').restore(a_tree(0))

def test_rows_that_are_damaged_or_gone_are_named(tmp_path, capsys):
    lived(tmp_path, 4)
    file = tmp_path/'metrics.jsonl'
    lines = file.read_text().splitlines(True)
    for bad in ('{"step": 2, "loss": "x"}\n', '{"loss": 1}\n', '\x00\n', '[1]\n', '['*10**5 + '\n'):
        file.write_text(lines[0] + bad + ''.join(lines[2:]))
        with pytest.raises(LabError, match='metrics.jsonl:2: is damaged; take this line out'): Run(tmp_path).metrics()
    file.write_text(lines[0] + ''.join(lines[2:]))
    with Run(tmp_path, {'lr': 1}, True) as run: run.restore(a_tree(0))
    assert 'holds 3 rows up to step 4, 4 were written' in capsys.readouterr().err

def test_what_is_named_is_never_deleted(tmp_path):
    "T8: the best, what a data set or a table names, and the only whole one."
    with Run(tmp_path) as run:
        for step in range(1, 8):
            run.save(step, a_tree(step))
            if step in (1, 3): run.keep(step, 'best')
            if step == 2: run.keep(2, 'data set v4')
        assert [f.name for f in run.checkpoints()] == ['2', '3', '6', '7'] and run.kept() == {'best': 3, 'data set v4': 2}
        for name in ('3', '6', '7'): heart(tmp_path/'checkpoints'/name).unlink()
        assert run.restore(a_tree(0))[0] == 2
        run.save(3, a_tree(3))
        assert run.restore(a_tree(0))[0] == 3

# ── a model of a stranger (W1, W2) ──

BANNED = {'pickle', 'cPickle', 'dill', 'joblib', 'marshal', 'shelve', 'msgpack_numpy', 'cloudpickle'}

def forbidden(source: str) -> list:
    "What a piece of code does that a hostile file could turn into a program."
    import ast
    found, false = [], lambda call, name: any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is False for k in call.keywords)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found += [a.name for a in node.names if a.name.split('.')[0] in BANNED]
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] in BANNED: found.append(node.module)
        if not isinstance(node, ast.Call): continue
        name = ast.unparse(node.func)
        if name in ('eval', 'exec', 'compile', '__import__', 'torch.load', 'yaml.load', 'yaml.unsafe_load', 'yaml.full_load', 'pd.read_pickle', 'pandas.read_pickle'): found.append(name)
        if name.split('.')[-1] == 'load' and name.split('.')[0] in ('np', 'numpy', 'jnp') and not false(node, 'allow_pickle'): found.append(name)
        found += ['trust_remote_code' for k in node.keywords if k.arg == 'trust_remote_code' and not false(node, k.arg)]
    return found

def test_nothing_here_can_be_made_to_run_a_file():
    for bad in ('import pickle', 'from joblib import load', 'eval(x)', 'np.load(f)', 'np.load(f, allow_pickle=True)', 'yaml.load(f)', 'g(trust_remote_code=True)', 'torch.load(f)'):
        assert forbidden(bad), bad
    assert not forbidden('np.load(f, allow_pickle=False); yaml.safe_load(f); json.load(f); g(trust_remote_code=False)')
    for file in (*(root/'rlhf_lab').glob('*.py'), root/'app.py', *(root/'bench').glob('*.py')):
        assert not forbidden(file.read_text(encoding='utf-8')), file.name

OPENED = []

def test_a_malicious_pickle_beside_a_model_is_never_opened(toy, tmp_path):
    from rlhf_lab.weights import load_model
    folder = Path(shutil.copytree(toy, tmp_path/'model'))
    for name in ('pytorch_model.bin', 'model.pkl', 'model.pt', 'arrays.npz', 'training_args.bin', 'tokenizer.pkl', 'modeling.py'): (folder/name).write_bytes(b'cos\nsystem\n(S"touch hacked"\ntR.')
    (folder/'tokenizer_config.json').write_text(json.dumps(dict(json.loads((folder/'tokenizer_config.json').read_text()), auto_map={'AutoTokenizer': ['modeling.Evil', None]})))
    sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == 'open' and str(args[0]).startswith(str(folder)) else None)
    with contextlib.suppress(CheckpointError): load_model(str(folder))
    assert any(name.endswith('config.json') for name in OPENED) and not any(name.endswith(('.bin', '.pkl', '.pt', '.npz', '.py')) for name in OPENED)

def test_a_model_is_plain_files(toy, tmp_path):
    from rlhf_lab.weights import load_model
    (tmp_path/'secret.json').write_text('{"secret": 1}')
    for n, name in enumerate(('config.json', 'model.safetensors', 'tokenizer.json', 'chat_template.jinja')):
        folder = Path(shutil.copytree(toy, tmp_path/str(n)))
        (folder/name).unlink(missing_ok=True)
        (folder/name).symlink_to(tmp_path/'secret.json')
        with pytest.raises(CheckpointError, match=f'{name}: is a link that leads elsewhere'): load_model(str(folder))
    (tmp_path/'alias').symlink_to(toy) # the person at the keyboard may call a folder what they like
    load_model(str(tmp_path/'alias'))

@pytest.mark.parametrize('header', [(2**63).to_bytes(8, 'little'), (2**62 - 1).to_bytes(8, 'little') + b'{}', (10**8).to_bytes(8, 'little') + b'{', b'\x02' + bytes(7) + b'[]',
    b'', b'\x08'], ids=['2^63', '2^62', 'too long', 'a list', 'empty', 'one byte'])
def test_a_hostile_header_costs_nothing(header, toy, tmp_path):
    import resource
    from rlhf_lab.weights import load_model
    folder = Path(shutil.copytree(toy, tmp_path/'model'))
    (folder/'model.safetensors').write_bytes(header)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CheckpointError, match='model.safetensors is broken|has no .safetensors|lacks the weights'): load_model(str(folder))
    assert time.process_time() - start < 2 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000

def test_settings_cannot_blow_up(tmp_path):
    "W5: aliases, depth, tags that make objects."
    from rlhf_lab.config import read_config
    from rlhf_lab.core import UsageError
    bomb = 'a: &a [x, x]\n' + ''.join(f'{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n' for a, b in zip('abcdefghijk', 'bcdefghijkl'))
    import yaml # that takes its time, and is no part of it
    for words, text in ((r'`\*` references', bomb), ('nested so deep', '['*10**5), ('nested so deep', '{"a":'*10**5), ('special characters', '\x00')):
        (tmp_path/'bad.yaml').write_text(text)
        start = time.process_time()
        with pytest.raises(UsageError, match=words): read_config(str(tmp_path/'bad.yaml'))
        assert time.process_time() - start < (.1 if text is bomb else 2)
    (tmp_path/'tag.yaml').write_text(f'a: !!python/object/apply:os.mkdir ["{tmp_path}/hacked"]')
    with contextlib.suppress(UsageError): read_config(str(tmp_path/'tag.yaml'))
    assert not (tmp_path/'hacked').exists()

# ── real processes ──

CLI = 'import sys; from rlhf_lab.cli import main; sys.exit(main())'

@pytest.mark.slow
def test_a_signal_saves_within_five_seconds_and_a_second_trainer_is_refused(toy, tmp_path):
    "T5 and T6, with the command line: the first SIGTERM finishes the update, saves and ends with 130."
    (tmp_path/'sft.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows_of('sft')))
    out, rows = tmp_path/'run', tmp_path/'run/metrics.jsonl'
    words = f'sft --model {toy} --data {tmp_path}/sft.jsonl --out {out} --rank 2 --top-layers 1 --batch-size 4 --precision float32 --holdout 0 --epochs 100000'
    trainer = subprocess.Popen([sys.executable, '-c', CLI, *words.split()], cwd=root, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        while not (rows.exists() and rows.stat().st_size) and trainer.poll() is None: time.sleep(.05)
        with pytest.raises(LabError, match=f'in use by process {trainer.pid};'): train('sft', toy, out, resume=True)
        trainer.send_signal(signal.SIGTERM)
        start = time.monotonic()
        said = trainer.communicate(timeout=60)[1]
        assert trainer.returncode == 130 and time.monotonic() - start < 10, said[-2000:] # five seconds to save, and some to take leave
    finally: trainer.kill()
    run = Run(out)
    last = run.checkpoints()[-1]
    assert f'stopped at step {last.name}, which is saved; go on with --resume' in said and run.metrics()[-1]['step'] == int(last.name)
    assert (last/'MANIFEST.json').stat().st_mtime - rows.stat().st_mtime < 5
    with Run(out, resume=True): assert (out/'run.lock').read_text().split()[0] == str(os.getpid()) # the lock went with its process

SERVER = """
import sys, os, time, random, signal
sys.path.insert(0, 'tests')
from pathlib import Path
from test_durability import METHODS, train
toy, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def child(name, out, resume):
    "A trainer in a process of its own, which need not import anything."
    pid = os.fork()
    if pid: return pid
    try:
        with open(folder/'log.txt', 'a') as log: os.dup2(log.fileno(), 1); os.dup2(log.fileno(), 2)
        train(name, toy, out, resume)
        os._exit(0)
    except BaseException:
        import traceback; traceback.print_exc()
        os._exit(1)

def end(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def checkpoints(out): return len(list((out/'checkpoints').glob('*'))) if (out/'checkpoints').exists() else 0

took = {}
for name in METHODS:
    start = time.monotonic()
    assert end(child(name, folder/f'{name}-whole', False)) == 0, name
    took[name] = time.monotonic() - start
chance, n = random.Random(seed), 0
while n < kills:
    for name in METHODS:
        if n >= kills: break
        out, inside = folder/name, n%3 == 2 # every third dies while something is being saved
        if (out/'model').exists(): # finished before it could be killed: once more
            os.rename(out, folder/f'{name}-{n}')
        pid, delay, seen = child(name, out, True), chance.uniform(.1, 1)*took[name], checkpoints(out)
        until = time.monotonic() + (60 if inside else delay)
        def saving(): return inside and (out/'checkpoints').exists() and any(f.suffix == '.tmp' for f in (out/'checkpoints').iterdir())
        while time.monotonic() < until and not saving() and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None: time.sleep(.0003 if inside else .02)
        os.kill(pid, signal.SIGKILL)
        code = end(pid)
        print(n, name, 'while saving' if inside else f'after {delay:.1f} s', code, flush=True)
        assert code in (0, -9), (folder/'log.txt').read_text()[-3000:]
        n += 1
for name in METHODS: assert end(child(name, folder/name, True)) == 0, name
"""

@pytest.mark.slow
def test_killed_fifty_times_every_method_ends_where_it_would_have(toy, tmp_path):
    "T1, with SIGKILL: six methods in turn, at random moments and inside saving; resumed each time, bit for bit the same at the end."
    done = subprocess.run([sys.executable, '-c', SERVER, toy, tmp_path, os.environ.get('RLHF_LAB_KILLS', '50'), '0'], cwd=root, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in METHODS:
        for other in (tmp_path/name, *tmp_path.glob(f'{name}-[0-9]*')):
            if (other/'model').exists(): assert end_of(other) == end_of(tmp_path/f'{name}-whole'), other.name
