"The loop: a kill at any stage loses nothing, only who surely won is promoted, votes can be followed, and nobody learns from what was withdrawn."
import json, shutil
from dataclasses import replace
from pathlib import Path
import jax, numpy as np, pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from rlhf_lab import loop as module
from rlhf_lab.cli import main
from rlhf_lab.compare import CompareConfig, Start, settings_of
from rlhf_lab.core import DataError, LabError, Rollout
from rlhf_lab.exports import freeze
from rlhf_lab.feedback import Feedback
from rlhf_lab.loop import IterateConfig, draw_questions, fate_of, inclusion, iterate, read_rows
from rlhf_lab.quickstart import QuickstartConfig, Stages, tiny, write_rows
from rlhf_lab.runs import digest

SMALL = dict(max_length=32, precision='float32', rank=2, top_layers=1, eos=False, batch_size=4, learning_rate=1e-2)

def gold(texts): return np.array([sum(text.count(letter) for letter in 'aei') - 2. for text in texts], float)

@pytest.fixture
def start(toy, tmp_path):
    "A start that knows nothing."
    rows = [dict(prompt=f'Film {i}:') for i in range(40)]
    write_rows(tmp_path/'asked.jsonl', rows)
    settings = tiny(QuickstartConfig(tiny=True))
    settings = replace(settings, new_tokens=6, dpo=replace(settings.dpo, **SMALL), reward=replace(settings.reward, **dict(SMALL, epochs=1)),
        ppo=replace(settings.ppo, **dict(SMALL, steps=2, epochs=1)))
    return Start(toy, '', str(tmp_path/'asked.jsonl'), '', gold, rows[:16], settings)

@pytest.fixture
def asked(tmp_path): return IterateConfig(out=str(tmp_path/'loop'), rounds=2, clicks=8, active=0., prompts=16)

@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    "Answers without a sampler, other ones for other weights; the slow tests and the notebook ask for real."
    def answer(model, prompts, *, key, n=1, max_new_tokens, **how):
        weights = sum(float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(nnx.state(model)))
        random = np.random.default_rng([int(weights*1000), *np.asarray(jax.random.key_data(key))])
        tokens = random.integers(10, 250, (len(prompts)*n, 8 + max_new_tokens))
        some, mask = random.normal(size=(2, *tokens.shape)), np.broadcast_to(np.arange(tokens.shape[1]) >= 8, tokens.shape)
        return Rollout(tokens, mask, logprobs=some[0], ref_logprobs=some[1])
    if 'slow' not in request.keywords: monkeypatch.setattr(module, 'ask', answer)

class Killed(Exception): "The power failed."

def learner(loop, n):
    "Stands in for a training: other weights in each round, the same whenever they are made."
    folder = loop.model(n)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(loop.start.model, folder)
    weights = load_file(folder/'model.safetensors')
    name = sorted(weights)[0]
    random = np.random.default_rng(len(read_rows(loop.folder(n)/'learned.jsonl')))
    weights[name] = weights[name] + random.normal(size=weights[name].shape).astype('float32')*np.float32(.3)
    save_file(weights, folder/'model.safetensors', {'format': 'pt'})

def judged(loop, n): (loop.folder(n)/'reward').mkdir(exist_ok=True)

def facts(folder): return json.loads((Path(folder)/'lineage.json').read_text())

# ── kill and go on ──

def test_a_kill_after_any_stage_changes_nothing(start, asked, tmp_path, monkeypatch):
    "The worst moment: the work is done, and nobody has written down that it is."
    whole = iterate(replace(asked, out=str(tmp_path/'whole')), start, judged, learner)
    finish, kills = Stages.do, []
    def fragile(stages, name, work):
        def once():
            work()
            if name not in kills: kills.append(name); raise Killed
        finish(stages, name, once)
    monkeypatch.setattr(Stages, 'do', fragile)
    for _ in range(30):
        try: found = iterate(replace(asked, resume=(tmp_path/'loop').exists()), start, judged, learner); break
        except Killed: pass
    assert kills == ['0: answers'] + [f'{n}: {stage}' for n in (1, 2) for stage in ('questions', 'votes', 'policy', 'comparison')]
    assert facts(tmp_path/'loop') == facts(tmp_path/'whole') and len(facts(tmp_path/'whole')) == 2
    timeless = lambda rows: [{name: x for name, x in row.items() if name not in ('seconds', 'peak_mb')} for row in rows]
    assert timeless(found) == timeless(whole)
    for name in ('report.md', 'table.json', 'gold.png'): assert (tmp_path/'loop'/name).stat().st_size

def test_a_vote_leads_to_weights_and_back(start, asked, tmp_path):
    iterate(asked, start, judged, learner)
    first, second = facts(tmp_path/'loop')
    assert [first['votes'], second['votes']] == [8, 16] and second['new_votes'] == 8
    for entry in (first, second):
        made, began = (digest(Path(folder)/'model.safetensors') for folder in (tmp_path/'loop'/entry['model'], start.model))
        assert entry['weights_sha256'] == made != entry['parent_sha256'] == began
        assert entry['version'].split('-')[1] == digest(tmp_path/'loop'/entry['data'])[:12]
    votes = read_rows(tmp_path/'loop/rounds/2/learned.jsonl')
    assert len({row['vote'] for row in votes}) == 16 and {'prompt', 'chosen', 'rejected', 'rater', 'probability', 'side'} <= set(votes[0])
    assert {row['side'] for row in votes} == {'first', 'second'} and len({row['rater'] for row in votes}) == 5
    assert [e['round'] for e in fate_of(tmp_path/'loop', '1-1')] == [1, 2] and [e['round'] for e in fate_of(tmp_path/'loop', '2-1')] == [2]
    with pytest.raises(DataError, match='no round'): fate_of(tmp_path/'loop', '3-1')
    questions = [row for n in (1, 2) for row in read_rows(tmp_path/f'loop/rounds/{n}/questions.jsonl')]
    assert len({row['prompt'] for row in questions}) > 12 # every prompt comes once before one comes again
    with pytest.raises(LabError, match='--resume'): iterate(asked, start, judged, learner)

# ── who is promoted ──

def answers(scores):
    "`answer_held` for policies whose scores are known."
    def write(loop, n):
        loop.folder(n).mkdir(parents=True, exist_ok=True)
        texts, size = ['a '*(scores[n] + i%2) + f'{i}.' for i in range(16)], len(loop.start.held)
        (loop.folder(n)/'answers.json').write_text(json.dumps(dict(texts=texts, gold=gold(texts).tolist(), kl=[0.]*size, length=[1.]*size)))
    return write

def test_only_who_surely_won_takes_over_and_the_next_meets_whoever_stayed(start, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'answer_held', answers({0: 2, 1: 9, 2: 9, 3: 3, 4: 18}))
    rows = iterate(replace(asked, rounds=4, reliability=3.), start, judged, learner)
    assert [row['promoted'] for row in rows] == [True, True, False, False, True]
    assert [row['against'] for row in rows[1:]] == ['sft', 'round 1', 'round 1', 'round 1']
    assert rows[2]['win_rate'] == .5 and rows[3]['win_rate'] < .1 and 'round 1 stays' in rows[3]['why'] # the same words are a tie
    assert all(row['promoted'] == (row['win_low'] > .5) for row in rows[1:])
    entries = facts(tmp_path/'loop')
    assert entries[3]['against_sha256'] == entries[0]['weights_sha256']
    report = (tmp_path/'loop/report.md').read_text()
    assert 'round 3 (32 votes' not in report and 'round 3 (24 votes' in report and 'was not promoted' in report

def test_sides_do_not_decide_a_blind_comparison():
    panel = module.make_panel(4, 0., side=9.)
    wins = module.blind_wins(panel, [f'a {i}' for i in range(400)], [f'b {i}' for i in range(400)], gold, 0)
    assert abs(wins.mean() - .5) < .05 and set(wins) > {0., 1.}

# ── which questions ──

def test_what_was_asked_by_doubt_can_be_weighted_back():
    "Reliability.md S8: each comes as often as its recorded probability says, and the weighted mean is that of asking all."
    random = np.random.default_rng(0)
    doubt = random.random(120)
    worth = doubt + .1*random.normal(size=120)
    for active in (0., .5, .9):
        chances = inclusion(doubt, 120, 30, active)
        drawn = [draw_questions(chances, seed) for seed in range(1500)]
        assert all(len(set(some)) == 30 for some in drawn) and np.isclose(chances.sum(), 30)
        often = np.bincount(np.concatenate(drawn), minlength=120)/1500
        assert np.abs(often - chances).max() < 5*np.sqrt(.25/1500)
        weighted, plain = np.array([[(worth[some]/chances[some]).sum()/120, worth[some].mean()] for some in drawn]).T
        assert abs(weighted.mean() - worth.mean()) < 4*weighted.std()/1500**.5
        assert active == 0 or plain.mean() > worth.mean() + .1*active

def test_the_doubtful_are_asked_more_often(start, asked, tmp_path, monkeypatch):
    "Two reward models that disagree more and more."
    def opinions(folder, trunk, precision):
        assert Path(folder).name == 'reward' and Path(folder).parent.name == '1'
        def disagree(rollout):
            rows = np.arange(len(rollout.tokens))
            return 0.*rows, np.outer([1, -1], rows%2*(rows//2))
        return disagree
    monkeypatch.setattr(module, 'judge_reward', opinions)
    iterate(replace(asked, active=.5), start, judged, learner)
    first, second = (read_rows(tmp_path/f'loop/rounds/{n}/questions.jsonl') for n in (1, 2))
    assert {row['probability'] for row in first} == {.5} and 'doubt' not in first[0]
    assert {row['probability'] for row in second} == {.25, .75}
    often, seldom = ([row['doubt'] for row in second if row['probability'] == p] for p in (.75, .25))
    assert min(often) > max(seldom)

@pytest.mark.parametrize('method', IterateConfig.__annotations__['method'].__args__)
def test_each_method_is_told_what_it_can_do(start, tmp_path, method):
    write_rows(tmp_path/'learned.jsonl', [dict(prompt='?', chosen='a', rejected='b')]*9)
    told = settings_of(CompareConfig(resume=True), start, method, 3, tmp_path/'run', tmp_path/'learned.jsonl')
    assert told.model == start.model and told.seed == 3 and not told.resume and told.data in (start.asked, str(tmp_path/'learned.jsonl'))

# ── thumbs and people ──

def test_thumbs_cost_as_many_clicks_as_pairs(start, asked, tmp_path):
    iterate(replace(asked, votes='thumbs', method='kto', rounds=1), start, judged, learner)
    thumbs = read_rows(tmp_path/'loop/rounds/1/thumbs.jsonl')
    assert len(thumbs) == 8 and len(read_rows(tmp_path/'loop/rounds/1/questions.jsonl')) == 4
    assert {'prompt', 'completion', 'label', 'rater', 'probability', 'side', 'vote'} == set(thumbs[0])

@pytest.mark.parametrize('votes, form', [('pairs', 'preference'), ('thumbs', 'unpaired')])
def test_a_vote_in_the_store_leads_to_a_model_until_it_is_withdrawn(start, asked, tmp_path, capsys, votes, form):
    "Pairs come from the store itself, thumbs from a folder of frozen versions."
    store, place, rows = Feedback(tmp_path/'votes.db'), tmp_path/'loop', 1 if votes == 'pairs' else 2 # for one judgement
    ann, events = store.session('ann'), []
    for i in range(6):
        answers = [store.record(f'Film {i}:', f' {word}{i}', model='sft', more=dict(split='train')) for word in ('good', 'bad')]
        events.append(store.judge('pair', answers, {'value': 'ab'[i%2]}, session=ann))
    say = lambda: freeze(store, tmp_path/'said', (form,)).id
    config = replace(asked, data=str(tmp_path/('votes.db' if votes == 'pairs' else 'said')), votes=votes)
    first = say()
    iterate(config, start, judged, learner)
    assert len(facts(place)) == 1 and 'waits' in capsys.readouterr().out and read_rows(place/'rounds/2/questions.jsonl')
    store.withdraw(events[0])
    second = say()
    iterate(replace(config, resume=True), start, judged, learner)
    one, two = facts(place)
    known = lambda entry: [entry[name] for name in ('source', 'votes', 'new_votes', 'gone')]
    assert known(one) == [first, 6*rows, 6*rows, 0] and known(two) == [second, 5*rows, 0, rows]
    assert not any('0' in row['prompt'] for row in read_rows(place/'rounds/2/learned.jsonl'))
    rounds = lambda name: [entry['round'] for entry in fate_of(place, name)]
    assert rounds(first) == [1] and rounds(second) == [2]
    if votes == 'pairs':
        assert rounds(events[0]) == [1] and rounds(events[1]) == [1, 2]
        models = lambda event: [model['weights_sha256'] for model in store.receipt(event)['checkpoints']]
        assert models(events[0]) == [one['weights_sha256']] and models(events[1]) == [one['weights_sha256'], two['weights_sha256']]
    store.close()

def test_a_mistake_costs_one_line(tmp_path, capsys):
    assert main(['iterate', '--start', str(tmp_path/'nowhere'), '--out', str(tmp_path/'out')]) == 4
    assert 'finish the quickstart' in capsys.readouterr().err
    assert main(['iterate', '--members', '1']) == 2 and main(['iterate', '--votes', 'thumbs', '--clicks', '5']) == 2

# ── for real ──

@pytest.mark.slow
@pytest.mark.parametrize('how', [dict(method='dpo', active=.5), dict(method='kto', votes='thumbs', active=.5, reliability=.3), dict(method='ppo', active=0.)], ids=lambda how: how['method'])
def test_real_trainings_are_killed_and_resumed(start, asked, tmp_path, how, monkeypatch):
    from rlhf_lab.runs import Run
    config = replace(asked, clicks=32, members=2, **how)
    whole = iterate(replace(config, out=str(tmp_path/'whole')), start)
    log, left = Run.log, [2, 5, 9]
    def fragile(run, step, measured):
        log(run, step, measured)
        left[:] = [n - 1 for n in left]
        if left and left[0] == 0: left.pop(0); raise Killed
    monkeypatch.setattr(Run, 'log', fragile)
    for _ in range(9):
        try: iterate(replace(config, resume=(tmp_path/'loop').exists()), start); break
        except Killed: pass
    assert facts(tmp_path/'loop') == facts(tmp_path/'whole') and len(whole) == 3 and not left
