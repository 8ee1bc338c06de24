"The first visit: what is carried along is whole and small, and a training beside the app starts, tells, stops and is taken up."
import importlib.util, json, os, shutil, subprocess, sys, time, tomllib
from pathlib import Path
import pytest
from rlhf_lab import workshop
from rlhf_lab.answers import LEARN, STAGES, Models, inert, rounds_of
from rlhf_lab.core import CheckpointError, LabError
from rlhf_lab.curves import find_runs, results, run_shown
from rlhf_lab.feedback import Feedback
from rlhf_lab.first import FIRST, Recorded, Served, toy_folder, wear
from rlhf_lab.runs import digest, lock
from rlhf_lab.workshop import Workshop, how_far, last_line

root = Path(__file__).resolve().parent.parent

# What is carried along

def test_the_bundle_is_whole_small_and_says_where_it_comes_from():
    record = json.loads((FIRST/'record.json').read_text())
    there = {str(f.relative_to(FIRST)): digest(f) for f in FIRST.rglob('*') if f.is_file() and f.name != 'record.json'}
    assert there == record['files']
    assert sum(f.stat().st_size for f in FIRST.rglob('*') if f.is_file()) < 5e6
    assert record['command'].startswith('rlhf-lab quickstart') and f'--seed {record["seed"]}' in record['command'] and len(record['commit']) >= 7
    assert all(cost['kl'] < .001 and cost['most'] < .05 for cost in record['rounding'].values()) and set(record['rounding']) == {'sft', 'ppo', 'dpo'}

def test_the_bundle_is_the_run_that_the_readme_shows():
    rows = {row['model']: row for row in json.loads((FIRST/'table.json').read_text())}
    shown = {row['model']: row for row in json.loads((root/'docs/quickstart/table.json').read_text())}
    assert rows['ppo']['gold_mean'] > rows['sft']['gold_mean'] < rows['dpo']['gold_mean']
    assert all(abs(rows[name]['gold_mean'] - shown[name]['gold_mean']) < .01 for name in STAGES)

def test_eight_prompts_with_four_answers_each_that_differ():
    samples = json.loads((FIRST/'answers.json').read_text())
    assert len(samples) == 8
    for sample in samples: assert len({sample['answers'][stage][0] for stage in STAGES}) == 4

def test_its_curves_and_frontier_are_shown_as_of_any_run():
    runs = find_runs(FIRST)
    assert {folder.name for folder in runs.values()} == {'sft', 'reward', 'ppo', 'dpo'}
    for folder in runs.values():
        shown = run_shown(folder)
        assert 'class="plot"' in shown and 'cannot&#32;read' not in shown and 'cannot read' not in shown
    assert 'dpo' in results(FIRST)

def test_no_path_of_the_machine_that_made_it():
    for file in FIRST.rglob('*.json*'): assert not any(word in file.read_text() for word in ('"/', '/tmp', '/home', '/root')), file

def test_a_wheel_would_carry_it():
    patterns = tomllib.loads((root/'pyproject.toml').read_text())['tool']['setuptools']['package-data']['rlhf_lab']
    files = [f for f in FIRST.rglob('*') if f.is_file()]
    assert all(any(f in set((root/'rlhf_lab').glob(pattern)) for pattern in patterns) for f in files)

def test_adapters_of_another_model_and_broken_ones_are_refused(toy, tmp_path):
    with pytest.raises(CheckpointError, match='does not fit'): Recorded(FIRST, toy).load('sft')
    (tmp_path/'cut').write_bytes((FIRST/'sft/adapter.safetensors').read_bytes()[:1000])
    with pytest.raises(CheckpointError, match='broken'): wear(None, tmp_path/'cut')

@pytest.mark.slow
def test_the_bundled_policies_speak_on_the_real_base_model():
    from rlhf_lab.weights import find_model
    try: find_model()
    except LabError as error: pytest.skip(f'the weights cannot be had: {error}')
    models, said = Recorded(FIRST), {}
    for stage in STAGES:
        first, *words = models.answer(stage, 'Continue this film review: The opening scene is', seed=0, temperature=0., max_new_tokens=12)
        assert first['model'] == stage and len(first['weights']) == 64
        said[stage] = words[-1]
    assert len(set(said.values())) >= 3, said # greedy: the trained ones say something else than the base model

# Who is served

def test_own_models_come_first_then_the_toy_then_the_recorded_ones(tmp_path):
    served = Served(tmp_path/'run')
    assert (served.folder, len(served.samples())) == (FIRST, 8) and not any(map(served.missing, STAGES))
    def make(folder):
        (folder/'sft/model').mkdir(parents=True); (folder/'sft/model/config.json').write_text('{}')
    make(toy_folder(tmp_path/'run'))
    assert served.folder == toy_folder(tmp_path/'run') and served.samples() == []
    make(tmp_path/'run')
    with lock(tmp_path/'run'): assert served.folder == toy_folder(tmp_path/'run') # not while it is being made
    assert served.folder == tmp_path/'run' and served.missing('ppo') and FIRST not in served.folders()

def test_a_toy_brings_its_own_base_model(tmp_path):
    (tmp_path/'base').mkdir(); (tmp_path/'base/config.json').write_text('{}')
    assert Models(tmp_path, 'no such model').found == tmp_path/'base'

# Train here

WORK = '''
import pathlib, signal, sys, time
folder, mood = pathlib.Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True, exist_ok=True); (folder/'config.json').write_text('{}')
if mood == 'stubborn': signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder/'stages.json').write_text('{"base": {}, "sft": {}}')
print('PPO 1/10\\rPPO 3/10 · 1:40, 3:54 left', flush=True)
if mood == 'fails': sys.exit('error: <b>no room</b>')
if mood == 'ends': (folder/'table.json').write_text('[]'); sys.exit(0)
time.sleep(60)
'''

def shop(tmp_path, mood): return Workshop(tmp_path/'runs/quickstart', command=lambda folder, kind, source: [sys.executable, '-c', WORK, str(folder), mood])

def until(condition):
    for _ in range(200):
        if condition(): return
        time.sleep(.05)
    raise AssertionError('it did not happen')

def test_only_one_training_at_a_time_and_another_page_sees_it(tmp_path):
    here = shop(tmp_path, 'works')
    here.start('full')
    until(lambda: last_line(here.log()))
    assert inert('sft ✓ → pairs') in how_far(here) and inert('3:54 left') in how_far(here) and inert('PPO 1/10') not in how_far(here)
    for kind in ('full', 'tiny'):
        with pytest.raises(LabError, match='already'): here.start(kind)
    here.stop()
    until(lambda: not here.running())
    assert inert('was stopped') in how_far(here) and '--resume' in workshop.command(tmp_path/'runs/quickstart', 'full')

def test_a_training_in_a_terminal_is_seen_and_not_stopped(tmp_path):
    here = shop(tmp_path, 'works')
    here.folders['tiny'].mkdir(parents=True)
    with lock(here.folders['tiny']):
        assert here.running() == str(os.getpid()) and inert('Training quickstart-tiny') in how_far(here)
        with pytest.raises(LabError, match='already'): here.start('full')
        with pytest.raises(LabError, match='not started here'): here.stop()

def test_stop_twice_ends_what_does_not_listen(tmp_path):
    here = shop(tmp_path, 'stubborn')
    here.start('full')
    until(lambda: last_line(here.log()))
    here.stop(); time.sleep(.2)
    assert here.running()
    here.stop()
    until(lambda: not here.running())

def test_how_it_ended_is_told_and_nothing_in_it_is_markup(tmp_path):
    here = shop(tmp_path, 'fails')
    here.start('full'); here.process.wait(20)
    assert inert('broke off') in how_far(here) and inert('<b>no room') in how_far(here) and '<b>' not in how_far(here)
    here = shop(tmp_path, 'ends')
    here.start('full'); here.process.wait(20)
    assert inert('its models answer') in how_far(here)
    with pytest.raises(LabError, match='finished'): here.start('full')

@pytest.mark.slow
def test_the_toy_is_trained_by_a_button_and_then_answers(tmp_path):
    here, served = Workshop(tmp_path/'runs/quickstart'), Served(tmp_path/'runs/quickstart')
    here.start('tiny')
    until(lambda: (toy_folder(tmp_path/'runs/quickstart')/'sft').exists() or not time.sleep(2))
    assert served.folder == FIRST
    assert here.process.wait(900) == 0, last_line(here.log())
    assert served.folder == here.folders['tiny']
    for stage in STAGES:
        _, *words = served.answer(stage, 'we saw a film', seed=0, temperature=1., max_new_tokens=4)
        assert words

@pytest.mark.slow
def test_votes_become_the_next_model_by_a_button_and_a_vote_taken_back_is_not_in_the_one_after(tmp_path):
    store, run = Feedback(tmp_path/'votes.db'), tmp_path/'runs/quickstart'
    here, served = Workshop(run, store=str(store.path)), Served(run)
    def train(kind):
        here.start(kind)
        assert here.process.wait(900) == 0, here.log().read_text()[-2000:]
    train('tiny')
    who, judged = store.session(scope=('store', 'train'), consent='test'), []
    for row in map(json.loads, (here.begun/'pairs.jsonl').read_text().splitlines()[:40]):
        ids = [store.record(row['prompt'], row[side], model='sft', session=who) for side in ('chosen', 'rejected')]
        judged.append(store.judge('pair', ids, dict(value='a'), session=who))
    assert served.missing('voted') == LEARN
    train('votes')
    (first,) = rounds_of(here.folders['votes'])
    assert served.missing('voted') == ('' if first['promoted'] else LEARN) and inert('Round 1') in how_far(here)
    if first['promoted']:
        facts, *words = served.answer('voted', 'we saw a film', seed=0, temperature=1., max_new_tokens=4)
        assert words and facts['weights'] == first['weights_sha256'] and facts['run'] == str(here.folders['votes'])
    taught = next(name for name in judged if store.receipt(name)['checkpoints']) # one in ten prompts is for validation
    store.withdraw(taught)
    train('votes')
    assert [row['gone'] for row in rounds_of(here.folders['votes'])] == [0, 1]
    train('votes')
    assert inert('No vote has come') in how_far(here)

# A Space

def test_requirements_are_those_of_the_project():
    project = tomllib.loads((root/'pyproject.toml').read_text())['project']
    lines = [line for line in (root/'requirements.txt').read_text().splitlines() if line and not line.startswith('#')]
    assert lines == [*project['dependencies'], *project['optional-dependencies']['app']], 'run .ci/requirements.py'

@pytest.fixture
def space(tmp_path):
    "The files of the repository as a Space lays them out."
    shutil.copytree(root/'rlhf_lab', tmp_path/'space/rlhf_lab', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('app.py', 'settings.ini', 'requirements.txt'): shutil.copy(root/name, tmp_path/'space')
    return tmp_path/'space'

def test_the_app_of_a_space_keeps_what_matters_on_the_disk_that_stays(space, tmp_path, monkeypatch):
    (disk := tmp_path/'disk').mkdir()
    for name in [name for name in os.environ if name.startswith('RLHF_LAB_')]: monkeypatch.delenv(name)
    monkeypatch.setenv('SPACE_ID', 'somebody/lab'); monkeypatch.setenv('RLHF_LAB_PERSISTENT', str(disk)); monkeypatch.chdir(space)
    spec = importlib.util.spec_from_file_location('space_app', space/'app.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    assert module.app and module.demo and (disk/'data/feedback.db').is_file() and not (space/'data').exists()

@pytest.mark.slow
def test_a_space_may_be_framed_by_its_host_and_by_nobody_else(space, tmp_path):
    code = '''
import rlhf_lab, app
from pathlib import Path
from fastapi.testclient import TestClient
assert Path(rlhf_lab.__file__).is_relative_to(Path.cwd())
reply = TestClient(app.app).get('/')
assert reply.status_code == 200 and 'first-line' in reply.text
assert 'frame-ancestors https://huggingface.co;' in reply.headers['content-security-policy'] and 'x-frame-options' not in reply.headers
'''
    env = {name: value for name, value in os.environ.items() if not name.startswith('RLHF_LAB_') and name != 'PYTHONPATH'}
    done = subprocess.run([sys.executable, '-c', code], cwd=space, env=dict(env, SPACE_ID='somebody/lab', RLHF_LAB_PERSISTENT=str(tmp_path), HF_HUB_OFFLINE='1'),
        capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
