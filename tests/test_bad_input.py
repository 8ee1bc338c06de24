"What a person gets wrong costs one line that names the thing and the way out, and an exit status; nothing is lost."
import io, json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from rlhf_lab.cli import main
from rlhf_lab.runs import Run, lock

SMALL = '--rank 2 --top-layers 1 --batch-size 4 --max-length 64 --precision float32 --holdout 0'.split()

def jsonl(*rows): return ''.join(json.dumps(row) + '\n' for row in rows)

DATA = dict(
    pairs=jsonl(*(dict(prompt=f'The film {i}', chosen=f' was a joy {i}.', rejected=f' was a bore {i}.') for i in range(16))),
    single=jsonl(*(dict(prompt=f'The film {i}', completion=f' was a joy {i}.') for i in range(8))),
    syntax='{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n', number=jsonl(dict(prompt='a', completion='b'), dict(prompt='a', completion=3)),
    columns=jsonl(dict(question='a', response='b')), roles=jsonl(dict(prompt=[dict(role='boss', content='a')], completion='b')),
    missing=jsonl(dict(prompt='a', completion='b'), dict(prompt='a', completion=None)), empty='', blank='\n\n',
    nothing=jsonl(dict(prompt='a', completion='')), same=jsonl(dict(prompt='a', chosen='b', rejected='b')),
    long=jsonl(dict(prompt='a', completion='word '*400)), few=jsonl(dict(prompt='a', completion='b')), asked=jsonl(dict(prompt='a')))

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bad')
    for name, text in DATA.items(): (folder/f'{name}.jsonl').write_text(text)
    (folder/'noise.jsonl').write_bytes(bytes(range(128, 256)))
    (folder/'broken.parquet').write_bytes(b'PAR1' + bytes(50))
    return folder

@pytest.fixture
def fails(place, toy, capfd, monkeypatch):
    "Call the command line and look at what it says, progress aside; `toy` stands for the model."
    monkeypatch.chdir(place)
    def call(code: int, words: str, *args):
        got = main([toy if arg == 'toy' else str(arg) for arg in args])
        err = ''.join(line for line in capfd.readouterr().err.splitlines(True) if not line.startswith('DPO '))
        assert (got, err.count('\n')) == (code, 1) and err.startswith('error: ') and words in err, f'{got} {err}'
        return err
    return call

# ── models ──

@pytest.mark.parametrize('verb', ['generate hi', 'chat', 'sft --data single.jsonl', 'reward --data pairs.jsonl', 'dpo --data pairs.jsonl',
    'ppo --data pairs.jsonl --reward x', 'data show single.jsonl'])
def test_a_missing_model(fails, verb, tmp_path):
    out = ['--out', tmp_path] if '--data' in verb else []
    fails(4, "model './nowhere' was not found", *verb.split(), '--model', './nowhere', *out)

def test_a_folder_that_is_no_model_and_one_that_is_damaged(fails, toy, tmp_path):
    fails(4, 'has no config.json', 'generate', '--model', '.', 'hi')
    for name, words in (('model.safetensors', 'model.safetensors is broken'), ('config.json', 'config.json'), ('tokenizer.json', 'tokenizer')):
        damaged = Path(shutil.copytree(toy, tmp_path/name))
        (damaged/name).write_text('{')
        assert str(damaged) in fails(4, words, 'generate', '--model', damaged, 'hi')

def test_a_name_that_the_hub_does_not_know_or_cannot_be_asked_about(fails, monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    fails(4, "model 'nobody/nothing' was not found", 'generate', '--model', 'nobody/nothing', 'hi')
    fails(3, 'nobody/nothing: cannot be loaded', 'data', 'check', 'nobody/nothing')

def test_a_reward_that_is_none(fails, tmp_path):
    fails(2, 'add --reward', 'ppo', '--model', 'toy', '--data', 'pairs.jsonl', '--out', tmp_path/'a', *SMALL)
    fails(4, 'nowhere holds no reward model', 'ppo', '--model', 'toy', '--data', 'pairs.jsonl', '--reward', 'nowhere', '--out', tmp_path/'b', *SMALL)
    fails(2, 'add --models', 'eval')

# ── data ──

@pytest.mark.parametrize('name, words', [('syntax', 'syntax.jsonl:2: '), ('number', "number.jsonl:2: column 'completion' is a number"),
    ('missing', 'missing.jsonl:2: '), ('columns', 'rename question to prompt, response to completion'), ('roles', 'roles.jsonl:1: '),
    ('empty', 'there are no rows'), ('blank', 'there are no rows'), ('noise', 'noise.jsonl:1: is not UTF-8'), ('nowhere', 'there is no such file')])
def test_broken_rows_and_no_rows(fails, name, words, tmp_path):
    fails(3, words, 'data', 'check', f'{name}.jsonl')
    fails(3, words, 'sft', '--model', 'toy', '--data', f'{name}.jsonl', '--out', tmp_path, *SMALL)

@pytest.mark.parametrize('verb, name, words', [('sft', 'nothing', 'no row is left after cleaning (1 empty)'),
    ('sft', 'long', 'no row is left after cleaning (1 too long)'), ('dpo', 'same', 'no row is left after cleaning (1 identical pair)'),
    ('sft', 'few', '1 examples do not fill a batch of 4: lower batch_size'), ('sft', 'asked', 'add a completion column'),
    ('dpo', 'single', 'chosen and rejected'), ('kto', 'single', 'completion and label, or chosen and rejected'), ('reward', 'single', 'chosen and rejected'), ('ppo', 'few', 'raise max_length, or lower'),
    ('dpo', 'empty', 'there are no rows'), ('reward', 'empty', 'there are no rows'), ('reward', 'number', 'number.jsonl:2')])
def test_rows_that_do_not_serve(fails, verb, name, words, tmp_path, monkeypatch):
    monkeypatch.setattr('rlhf_lab.practise.load_reward', lambda *_: None)
    fails(3, words, verb, '--model', 'toy', '--data', f'{name}.jsonl', '--out', tmp_path, *SMALL)

def test_no_data_and_no_parquet(fails, tmp_path):
    fails(3, 'add --data', 'sft', '--model', 'toy', '--out', tmp_path/'a')
    fails(3, 'broken.parquet: cannot be loaded', 'data', 'check', 'broken.parquet')

# ── prompts and settings ──

def test_a_prompt_that_fills_the_context(fails, monkeypatch):
    words = 'do not fit the context of 128: shorten the prompt or ask for fewer tokens'
    fails(1, words, 'generate', '--model', 'toy', 'hello '*200)
    fails(1, words, 'generate', '--model', 'toy', 'hi', '--max-new-tokens', 500)
    monkeypatch.setattr('sys.stdin', io.StringIO('hello '*200 + '\n'))
    fails(1, words, 'chat', '--model', 'toy')

def test_misspelt_settings(fails, place):
    (place/'c.yaml').write_text('sft:\n  learning_rat: 1\n')
    fails(2, 'Did you mean `--learning-rate`?', 'sft', '--learning-rat', 1)
    fails(2, '(c.yaml:2). Did you mean `sft.learning_rate`?', 'sft', '--config', 'c.yaml')
    fails(2, 'Did you mean `quickstart`?', 'quikstart')
    fails(2, "'many'", 'dpo', '--steps', 'many')

@pytest.mark.parametrize('words, line', [("'dpo_hinge'", 'dpo --loss dpo_hinge'), ('choose cdpo, robust or exo', 'dpo --flipped .1'), ('has no reference', 'dpo --loss simpo --ref-alpha .6'),
    ('not by both', 'dpo --chunks 2 --ref-alpha .6'), ('use epochs 1', 'dpo --chunks 2 --epochs 2'), ('use accumulate 1', 'kto --accumulate 2'), ('batch_size of 2', 'kto --batch-size 1')])
def test_settings_that_do_not_go_together(fails, words, line): fails(2, words, *line.split())

# ── runs ──

def dpo(*more): return ['dpo', '--model', 'toy', '--data', 'pairs.jsonl', '--save-every', '2', *SMALL, *more]

@pytest.fixture(scope='module')
def done(place, toy):
    "The folder of a finished run of four updates."
    data = ['--data', str(place/'pairs.jsonl'), '--out', str(place/'done')]
    assert main([toy if arg == 'toy' else arg for arg in dpo()] + data) == 0
    return place/'done'

@pytest.fixture
def run(done, tmp_path): return Path(shutil.copytree(done, tmp_path/'run'))

def test_a_folder_in_use_and_a_folder_that_was_used(fails, run, tmp_path):
    with lock(run): fails(1, f'{run}: in use by process {os.getpid()}; wait for it, or choose', *dpo('--out', run, '--resume'))
    fails(1, f'{run}: already holds a run; go on with it (--resume)', *dpo('--out', run))
    (tmp_path/'file').write_text('thesis')
    fails(1, 'choose another', *dpo('--out', tmp_path/'file'))
    assert len(Run(run).metrics()) == 4 and (tmp_path/'file').read_text() == 'thesis'

def damage(checkpoint: Path):
    file = max((f for f in checkpoint.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-9])

def test_a_damaged_checkpoint_is_passed_over_and_named(run, toy, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    before = Run(run).metrics()
    damage(run/'checkpoints/4')
    assert main([toy if arg == 'toy' else arg for arg in dpo('--out', str(run), '--resume')]) == 0
    err = capfd.readouterr().err
    assert f'{run}/checkpoints/4/' in err and 'using step 2' in err and 'Traceback' not in err
    after = Run(run).metrics()
    assert [row['step'] for row in after] == [1, 2, 3, 4] and after[-1]['loss'] == pytest.approx(before[-1]['loss'], abs=1e-5)

def test_no_checkpoint_is_left(fails, run):
    for checkpoint in (run/'checkpoints').iterdir(): damage(checkpoint)
    err = fails(4, 'no good checkpoint is left: start again in another folder', *dpo('--out', run, '--resume'))
    assert 'checkpoints/4/' in err and 'checkpoints/2/' in err and len(Run(run).metrics()) == 4

def test_resuming_something_else(fails, run):
    fails(4, 'resume with the settings of that run', *dpo('--out', run, '--resume', '--rank', '4'))
    fails(4, 'the seed changed', *dpo('--out', run, '--resume', '--seed', '4'))

@pytest.fixture
def disk(tmp_path):
    "A disk of 2 MB."
    folder = tmp_path/'disk'
    folder.mkdir()
    if sys.platform != 'linux' or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', folder], capture_output=True).returncode:
        pytest.skip('may not mount a small disk')
    try: yield folder
    finally: subprocess.run(['umount', folder])

@pytest.mark.parametrize('left', [0, 12_000, 1_100_000])
def test_a_full_disk(fails, disk, left, toy):
    (disk/'photos').write_bytes(bytes(shutil.disk_usage(disk).free - left))
    assert f'{disk}/run' in fails(1, 'make room and go on with --resume', *dpo('--out', disk/'run'))
    (disk/'photos').unlink()
    assert main([toy if arg == 'toy' else str(arg) for arg in dpo('--out', disk/'run', '--resume')]) == 0
    assert [row['step'] for row in Run(disk/'run').metrics()] == [1, 2, 3, 4]
