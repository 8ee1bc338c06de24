"What would bore a reader of 01_runs: crashes at any moment, every way to damage a checkpoint, full disks, two trainers at once."
import contextlib, errno, json, math, shutil
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, pytest
from rlhf_lab.core import CheckpointError, LabError, State, UsageError
from rlhf_lab.progress import progress
from rlhf_lab.runs import Run, cache_dir, load_tree, save_tree, setting

def a_tree(seed: int = 0) -> dict:
    "Everything that a trainer may want back."
    import optax
    params = {'layers': [{'w': jax.random.normal(jax.random.key(seed), (4, 3))}, {'w': jnp.ones(2, jnp.bfloat16)}]}
    return dict(params=params, opt=optax.adamw(1e-3).init(params), step=jnp.int32(seed), key=jax.random.key(seed), old_key=jax.random.PRNGKey(3),
                other_key=jax.random.key(1, impl='rbg'), keys=jax.random.split(jax.random.key(2), 3), none=None, empty=jnp.zeros((0, 2)),
                cursor=dict(epoch=2, place=2**40, done=False), kl=.1 + seed, table=np.arange(5, dtype=np.int16))

def same(a, b):
    raw = lambda x: np.asarray(jax.random.key_data(x) if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert type(x) is type(y) and getattr(x, 'dtype', 0) == getattr(y, 'dtype', 0)
        np.testing.assert_array_equal(raw(x), raw(y))

# ── checkpoints ──

def test_every_kind_of_leaf_comes_back(tmp_path):
    save_tree(tmp_path/'1', a_tree(3))
    same(load_tree(tmp_path/'1', a_tree(0)), a_tree(3))

def test_a_state_comes_back_and_can_be_donated(tmp_path):
    state = State(params={'w': jnp.ones(3)}, frozen={}, opt_state=(), step=jnp.int32(4), key=jax.random.key(0), graph=None)
    save_tree(tmp_path/'1', state)
    again = load_tree(tmp_path/'1', state.replace(params={'w': jnp.zeros(3)}, step=jnp.int32(0)))
    moved = jax.jit(lambda s: s.replace(step=s.step + 1), donate_argnums=0)(again)
    assert int(moved.step) == 5 and float(moved.params['w'].sum()) == 3

def damage_missing(f): f.unlink()
def damage_empty(f): f.write_bytes(b'')
def damage_half(f): f.write_bytes(f.read_bytes()[:f.stat().st_size//2])
def damage_bit(f): data = bytearray(f.read_bytes()); data[len(data)//2] ^= 4; f.write_bytes(data)
def damage_more(f): f.write_bytes(f.read_bytes() + b'\0')
def damage_folder(f): f.unlink(); f.mkdir()

@pytest.mark.parametrize('damage', [damage_missing, damage_empty, damage_half, damage_bit, damage_more, damage_folder])
def test_any_damage_to_any_file_is_named_and_an_older_checkpoint_used(tmp_path, damage, capsys):
    with Run(tmp_path/'run') as run:
        run.save(1, a_tree(1))
        run.save(2, a_tree(2))
    whole = tmp_path/'whole'
    shutil.copytree(run.path/'checkpoints/2', whole)
    names = [f.relative_to(whole) for f in sorted(whole.rglob('*')) if f.is_file() and f.stat().st_size]
    assert len(names) > 5
    for name in names:
        shutil.rmtree(run.path/'checkpoints/2')
        shutil.copytree(whole, run.path/'checkpoints/2')
        damage(run.path/'checkpoints/2'/name)
        step, tree = run.restore(a_tree())
        assert step == 1, name
        assert name.name in capsys.readouterr().err
    same(tree, a_tree(1))

def test_when_no_checkpoint_is_good_all_defects_are_listed(tmp_path):
    with Run(tmp_path) as run:
        for step in (1, 2): run.save(step, a_tree(step))
    for f in tmp_path.rglob('MANIFEST.json'): f.unlink()
    with pytest.raises(CheckpointError, match='checkpoints/2: has no MANIFEST.json; .*checkpoints/1: has no MANIFEST.json; no good'):
        run.restore(a_tree())

@pytest.mark.parametrize('other, words', [
    (dict(w=jnp.zeros(3)), r"\['w'\] is \['float32', \[2\]\]"), (dict(w=jnp.zeros(2, int)), 'int32'),
    (dict(w=jnp.zeros(2), b=jnp.zeros(1)), r"\['b'\] is missing"), (dict(), 'no such thing')])
def test_a_tree_that_does_not_fit_is_refused(tmp_path, other, words):
    save_tree(tmp_path/'1', dict(w=jnp.zeros(2)))
    with pytest.raises(CheckpointError, match=words): load_tree(tmp_path/'1', other)

def test_the_last_two_stay_and_a_broken_future_goes(tmp_path):
    with Run(tmp_path) as run:
        for step in (1, 2, 10, 11): run.save(step, a_tree(step))
        assert [f.name for f in run.checkpoints()] == ['10', '11']
        (tmp_path/'checkpoints/11/MANIFEST.json').write_text('{}')
        assert run.restore(a_tree())[0] == 10
        run.save(10, a_tree(10))
        assert [f.name for f in run.checkpoints()] == ['10']

def test_what_a_crash_left_behind_is_cleared(tmp_path):
    with Run(tmp_path) as run: run.save(1, a_tree())
    for name in ('2.tmp', '2.tmp.orbax-checkpoint-tmp', '3.gone'): (tmp_path/'checkpoints'/name).mkdir()
    with Run(tmp_path, resume=True) as run: assert run.restore(a_tree())[0] == 1
    assert [f.name for f in (tmp_path/'checkpoints').iterdir()] == ['1']

# ── full disks ──

def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp
    def full(self, path, *_, **__):
        Path(path).mkdir(parents=True)
        raise ValueError(f'RESOURCE_EXHAUSTED: writing {path}: No space left on device')
    def late(path): raise OSError(errno.ENOSPC, 'No space left on device')
    with Run(tmp_path) as run:
        run.save(1, a_tree(1))
        for place, act in ((f'{ocp.__name__}.PyTreeCheckpointer.save', full), ('rlhf_lab.runs.sync', late)):
            monkeypatch.setattr(place, act)
            for step in (2, 1):
                with pytest.raises(LabError, match=rf'checkpoints/{step}: the disk is full, \d+ MB are left; make room'): run.save(step, a_tree(2))
            monkeypatch.undo()
        assert [f.name for f in (tmp_path/'checkpoints').iterdir()] == ['1']
        same(run.restore(a_tree())[1], a_tree(1))

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full')
def test_a_full_disk_while_logging(tmp_path):
    with Run(tmp_path) as run:
        (tmp_path/'metrics.jsonl').symlink_to('/dev/full')
        with pytest.raises(LabError, match='metrics.jsonl: the disk is full'): run.log(1, {'loss': 1.})

def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(LabError, match='file/run'):
        with Run(tmp_path/'file/run'): pass

# ── folders ──

def test_a_folder_with_anything_in_it_is_never_taken(tmp_path):
    (tmp_path/'thesis.tex').write_text('years of work')
    with pytest.raises(LabError, match='already holds a run; go on with it .--resume., or choose another folder'):
        with Run(tmp_path): pass
    assert (tmp_path/'thesis.tex').exists()

def test_a_run_that_failed_before_its_first_step_can_be_repeated(tmp_path):
    with contextlib.suppress(ZeroDivisionError):
        with Run(tmp_path, {'lr': 1}): 1/0
    with Run(tmp_path, {'lr': 2}): pass
    assert json.loads((tmp_path/'config.json').read_text()) == {'lr': 2}

def test_resuming_with_other_settings_keeps_both(tmp_path):
    with Run(tmp_path, {'lr': 1}) as run: run.log(1, {'loss': 1})
    with Run(tmp_path, {'lr': 2}, resume=True): pass
    kept = sorted(json.loads(f.read_text())['lr'] for f in tmp_path.glob('config*.json'))
    assert kept == [1, 2] and json.loads((tmp_path/'config.json').read_text()) == {'lr': 2}

def test_a_run_that_never_saved_resumes_at_zero_and_a_look_at_nothing_is_an_error(tmp_path):
    with Run(tmp_path) as run: run.log(1, {'loss': 1})
    with Run(tmp_path, resume=True) as run: assert run.restore({'w': 1})[0] == 0
    assert run.metrics() == []
    with pytest.raises(CheckpointError, match='no good checkpoint'): run.restore({'w': 1})

# ── metrics, settings, progress ──

def test_metrics_are_numbers_and_survive_a_torn_line(tmp_path):
    with Run(tmp_path) as run:
        run.log(1, {'a': jnp.float32(1.5), 'b': np.int64(2), 'c': float('nan'), 'd': True})
        with open(tmp_path/'metrics.jsonl', 'a') as f: f.write('{"step": 2, "a"')
    row, = run.metrics()
    assert math.isnan(row.pop('c')) and row == {'step': 1, 'a': 1.5, 'b': 2., 'd': 1.}
    for line in (tmp_path/'metrics.jsonl').read_text().split('\n')[:1]: json.loads(line, parse_constant=pytest.fail)
    with pytest.raises(ValueError), Run(tmp_path, resume=True) as run: run.log(2, {'a': 'high'})

def test_logging_outside_with_is_a_defect(tmp_path):
    with pytest.raises(AssertionError, match='inside `with'): Run(tmp_path/'x').log(1, {})

def test_settings_come_from_the_environment_then_the_nearest_file_of_ours(tmp_path, monkeypatch):
    monkeypatch.delenv('RLHF_LAB_SETTINGS', raising=False)
    (tmp_path/'settings.ini').write_text('[DEFAULT]\nlib_name = rlhf_lab\n[lab]\npace = 3\n')
    (tmp_path/'a/b').mkdir(parents=True)
    (tmp_path/'a/settings.ini').write_text('[lab]\npace = 99\n') # someone else's
    monkeypatch.chdir(tmp_path/'a/b')
    assert setting('lab', 'pace', 1) == 3
    monkeypatch.setenv('RLHF_LAB_PACE', '4')
    assert setting('lab', 'pace', 1) == 4 and setting('lab', 'pace', 1.) == 4. and setting('app', 'pace', '') == '4'
    assert setting('lab', 'other', 'x') == 'x' and setting('nowhere', 'at_all', 2) == 2
    monkeypatch.setenv('RLHF_LAB_SETTINGS', str(tmp_path/'none.ini'))
    with pytest.raises(UsageError, match='none.ini: cannot be read as settings'): setting('lab', 'other', 1)
    (tmp_path/'none.ini').write_text('no section\n')
    with pytest.raises(UsageError, match='none.ini: cannot be read as settings'): setting('lab', 'other', 1)

def test_the_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv('RLHF_LAB_CACHE', str(tmp_path/'c'))
    assert cache_dir() == tmp_path/'c' and cache_dir().is_dir()

def test_progress_without_a_terminal_writes_plain_lines(capsys):
    items = [(step, {'loss': 1/step}) for step in range(1, 6)]
    assert list(progress(iter(items), 5, 'sft', every=1e-9)) == items
    said = capsys.readouterr().err
    assert '\r' not in said and said.split('\n')[0].startswith('sft 1/5 · 0:00') and 'loss 0.2' in said
