"The command line from outside: exit statuses, messages, and a saved config that repeats its run."
import dataclasses, json, subprocess, sys, typing
from pathlib import Path
import pytest
from rlhf_lab.cli import Verb, find, main, verbs
from rlhf_lab.config import parse, read_config
from rlhf_lab.core import CheckpointError, DataError, LabError, UsageError
from rlhf_lab.runs import Run, as_dict

root = Path(__file__).resolve().parent.parent

@dataclasses.dataclass
class Adapter:
    rank: int = 16 # Width
    on: bool = True # Use it

@dataclasses.dataclass
class Stub:
    "A stage that stands for all."
    model: str = 'tiny' # Where to start
    data: str|None = None # Rows
    run: Path = Path('runs/stub') # Folder
    lr: float = 1e-4 # Learning rate
    steps: int = 3
    betas: tuple[float, float] = (.9, .95)
    stop: tuple[str, ...] = ()
    kind: typing.Literal['cosine', 'flat'] = 'cosine'
    kl_coef: float = .05 # Price of leaving the reference
    resume: bool = False
    adapter: Adapter = dataclasses.field(default_factory=Adapter)

seen = []

def stage(config: Stub):
    seen.append(config)
    with Run(config.run, config, config.resume) as run: run.log(1, {'loss': 1.})

def failing(config: Stub): raise seen.pop()

@pytest.fixture(autouse=True)
def stubs(monkeypatch):
    seen.clear()
    for name, run in (('stub', 'stage'), ('failing', 'failing')):
        monkeypatch.setitem(verbs, name, Verb('a stub', f'{__name__}:Stub', f'{__name__}:{run}'))

def said(capsys, *args) -> tuple:
    code = main([str(a) for a in args])
    return code, capsys.readouterr().err

# ── settings ──

def test_a_saved_config_repeats_its_run(tmp_path, capsys):
    flags = '--lr 3e-7 --stop x y --adapter.no-on --betas 0.5 0.6 --kind=flat --run'.split()
    assert main(['stub', *flags, str(tmp_path/'a')]) == 0
    assert main(['stub', '--config', str(tmp_path/'a/config.json'), '--run', str(tmp_path/'b')]) == 0
    assert as_dict(seen[0]) | {'run': ''} == as_dict(seen[1]) | {'run': ''}
    assert seen[1].betas == (.5, .6) and seen[1].stop == ('x', 'y') and not seen[1].adapter.on and seen[1].data is None
    saved = [json.loads((tmp_path/f/'config.json').read_text()) for f in 'ab']
    assert saved[0] | {'run': ''} == saved[1] | {'run': ''}

def test_later_files_win_and_flags_win_over_files(tmp_path, capsys):
    (tmp_path/'1.yaml').write_text('lr: 1\nsteps: 10\nadapter:\n  rank: 4\n')
    (tmp_path/'2.yaml').write_text('# second\nstub:\n  lr: 2\n  kl_coef: 1e-3\nother:\n  anything: 5\n')
    config, origins = parse('stub', Stub, ['--steps', '7', '-c', str(tmp_path/'1.yaml'), f'--config={tmp_path/"2.yaml"}'])
    assert (config.lr, config.steps, config.kl_coef, config.adapter.rank) == (2, 7, .001, 4)
    assert origins == {'lr': f'{tmp_path}/2.yaml:3', 'steps': 'flag', 'adapter.rank': f'{tmp_path}/1.yaml:4', 'kl_coef': f'{tmp_path}/2.yaml:4'}

def test_the_resolved_config_is_printed_with_origins(tmp_path, capsys):
    (tmp_path/'a.yaml').write_text('lr: 1\n')
    main(['stub', '-c', str(tmp_path/'a.yaml'), '--run', str(tmp_path/'r'), '--no-resume'])
    lines = [line.split() for line in capsys.readouterr().out.split('\n')]
    assert ['lr', '1.0', f'{tmp_path}/a.yaml:1'] in lines and ['resume', 'False', 'flag'] in lines and ['steps', '3'] in lines

@pytest.mark.parametrize('text, words', [
    ('lr: 1\n\nkl_coeff: 0.1\n', 'unknown key `stub.kl_coeff` (FILE:3). Did you mean `stub.kl_coef`?'),
    ('stub:\n  kl_coeff: 0.1\n', 'unknown key `stub.kl_coeff` (FILE:2). Did you mean `stub.kl_coef`?'),
    ('adapter:\n  ranck: 1\n', 'unknown key `adapter.ranck` (FILE:2). Did you mean `adapter.rank`?'),
    ('zzz: 1\n', 'unknown key `stub.zzz` (FILE:1). See --help.'),
    ('lr: fast\n', "could not convert string to float: 'fast' (FILE:1)"),
    ('steps: 2.5\n', '(FILE:1)'), ('kind: round\n', '(FILE:1)'), ('betas: [1]\n', '--betas'),
    ('- 1\n', 'FILE:1: expected `key: value`'), ('lr: {a: 1}\n', 'unknown key `lr.a`'), ('lr: [[1]]\n', 'FILE:1: expected'),
    ('a: &x [1]\nb: *x\n', 'references are not read'), ('lr: [\n', 'FILE: '), ('a: b: c', 'FILE: '), ('lr: "\x00"', 'FILE: ')])
def test_a_bad_file_gets_its_line(tmp_path, capsys, text, words):
    file = tmp_path/'bad.yaml'
    file.write_text(text)
    code, err = said(capsys, 'stub', '--config', file)
    assert code == 2 and words.replace('FILE', str(file)) in err and err.startswith('error: ') and err.count('\n') == 1

def test_an_alias_bomb_is_refused_at_once(tmp_path):
    levels = ''.join(f'l{n}: &l{n} [{", ".join([f"*l{n - 1}"]*9)}]\n' for n in range(1, 12))
    (tmp_path/'bomb.yaml').write_text('l0: &l0 [x]\n' + levels)
    with pytest.raises(UsageError, match='references'): read_config(str(tmp_path/'bomb.yaml'))

def test_a_deep_file_and_a_missing_file(tmp_path, capsys):
    (tmp_path/'deep.yaml').write_text('['*5000)
    for name in ('deep.yaml', 'none.yaml', '.'):
        code, err = said(capsys, 'stub', '-c', tmp_path/name)
        assert code == 2 and err.count('\n') == 1, err

def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path/'empty.yaml').write_text('# nothing yet\n')
    assert parse('stub', Stub, ['-c', str(tmp_path/'empty.yaml')]) == (Stub(), {})

# ── flags and verbs ──

@pytest.mark.parametrize('args, words', [
    (['stub', '--kl-coeff', '1'], 'unknown flag `--kl-coeff`. Did you mean `--kl-coef`?'),
    (['stub', '--kl_coeff=1'], 'Did you mean `--kl-coef`?'), (['stub', '--no-resumes'], 'Did you mean `--no-resume`?'),
    (['stub', '--lr'], '--lr'), (['stub', '--lr', 'x'], "could not convert string to float: 'x'"), (['stub', 'stray'], 'stray'),
    (['stub', '--config'], '--config needs a file'), (['stub', '--kind', 'round'], 'round'), (['stbu'], 'Did you mean `stub`?'),
    (['data'], 'unknown verb `data`'), (['data', 'chek'], 'Did you mean `data check`?'), (['--nothing'], 'unknown verb')])
def test_a_misspelt_word_gets_the_right_one(capsys, args, words):
    code, err = said(capsys, *args)
    assert code == 2 and words in err and err.startswith('error: ') and err.count('\n') == 1

def test_help_and_version(capsys):
    assert main([]) == 2 and main(['--help']) == 0 and main(['--version']) == 0
    assert main(['stub', '--help']) == 0
    out = capsys.readouterr().out
    assert 'Price of leaving the reference' in out and '0.1.0' in out

@pytest.mark.parametrize('error, code, words', [
    (LabError('runs/x: in use'), 1, 'runs/x: in use'), (UsageError('u'), 2, 'u'), (DataError('d.jsonl:3: x'), 3, 'd.jsonl:3: x'),
    (CheckpointError('c'), 4, 'c'), (OSError(28, 'No space left on device', 'runs/x/model'), 1, 'runs/x/model: no space is left'),
    (KeyError('prompt'), 1, "KeyError: 'prompt' (unexpected; --debug shows where)"), (ValueError('a\n  b'), 1, 'ValueError: a b')])
def test_an_error_is_one_line_and_a_status(capsys, error, code, words):
    seen.append(error)
    got, err = said(capsys, 'failing')
    assert got == code and words in err and err.count('\n') == 1 and 'Traceback' not in err
    seen.append(error)
    assert 'Traceback' in said(capsys, 'failing', '--debug')[1]

def test_ctrl_c_is_130(capsys):
    seen.append(KeyboardInterrupt())
    assert said(capsys, 'failing') == (130, 'interrupted\n')

def test_a_folder_in_use_is_refused_and_can_be_resumed(tmp_path, capsys):
    assert main(['stub', '--run', str(tmp_path/'a')]) == 0
    code, err = said(capsys, 'stub', '--run', tmp_path/'a')
    assert code == 1 and '--resume' in err
    assert main(['stub', '--run', str(tmp_path/'a'), '--resume']) == 0

@pytest.mark.parametrize('name', [name for name in verbs if name not in ('stub', 'failing')])
def test_every_verb_leads_somewhere(name, capsys):
    verb = verbs[name]
    assert dataclasses.is_dataclass(find(verb.config)) and callable(find(verb.run))
    assert main([*name.split(), '--help']) == 0

# ── from a shell ──

def test_from_a_shell(tmp_path):
    (tmp_path/'bad.jsonl').write_text('{"prompt": 3}\n')
    call = [sys.executable, '-c', 'import sys; from rlhf_lab.cli import main; sys.exit(main())']
    done = subprocess.run([*call, 'data', 'check', tmp_path/'bad.jsonl'], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 3 and 'bad.jsonl:1' in done.stderr and 'Traceback' not in done.stderr

def test_a_reader_that_goes_away_is_no_error():
    code = 'import sys; from rlhf_lab.cli import main; sys.exit(main())'
    done = subprocess.run(f'{sys.executable} -c "{code}" --help | true', shell=True, capture_output=True, text=True, cwd=root, timeout=60)
    assert 'Traceback' not in done.stderr
