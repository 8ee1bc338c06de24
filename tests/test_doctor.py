"Every pathology is provoked and called by its name; healthy runs, real and imagined, raise no alarm."
import json, math, types
from pathlib import Path
import numpy as np, pytest
from rlhf_lab.cli import main
from rlhf_lab.doctor import DPO_SIGNS, PPO_SIGNS, columns, doctor_line, examine, fitting, replay, watched
from rlhf_lab.runs import Run

ALL = tuple(dict.fromkeys(PPO_SIGNS + DPO_SIGNS))
N = 60 # steps

def ramp(start, end, rate=12.): return end + (start - end)*np.exp(-np.arange(N)/rate)
def line(start, end): return np.linspace(start, end, N)

def ppo(seed: int = 0) -> dict: # Columns
    "What a healthy run of PPO on a small language model measures: levels and noise as in the quickstart."
    random = np.random.default_rng(seed)
    noisy = lambda mean, std: mean + std*random.normal(size=N)
    entropy, length = ramp(3.7, 3.1), noisy(28., .6)
    return {'step': np.arange(1, N + 1), 'objective/kl': np.append(0, noisy(ramp(0, 5.5), .25)[1:]), 'objective/scores': noisy(ramp(0, 1.2), .12),
        'objective/scores_std': noisy(ramp(1, .8), .07), 'objective/entropy': noisy(entropy*length, 1.5), 'policy/entropy_avg': noisy(entropy, .04),
        'policy/approxkl_avg': noisy(.01, .002), 'policy/clipfrac_avg': noisy(.05, .01), 'loss/policy_avg': noisy(-.01, .004), 'loss/value_avg': noisy(ramp(.5, .2), .03),
        'val/ratio': noisy(1., .004), 'val/clipfrac_avg': noisy(.1, .03), 'lab/ratio_off': random.lognormal(.2, .3, N), 'lab/explained_variance': noisy(ramp(0, .6), .06),
        'lab/frac_eos': noisy(.6, .06), 'lab/length': length, 'lab/kl_coef': ramp(.05, .07), 'lab/updates': np.full(N, 8.), 'lab/sampler_gap': noisy(.004, .0005),
        'lab/length_corr': noisy(.05, .12), 'lab/repetition': noisy(.01, .003), 'lab/distinct': noisy(.98, .01), 'lab/frac_zero_std': np.abs(noisy(.05, .03)),
        'lab/disagreement': noisy(ramp(.2, .26), .02), 'lab/over_budget': np.zeros(N), 'lab/advantage_std': noisy(.6, .04), 'grad_norm': random.lognormal(0, .4, N),
        'skipped': np.zeros(N), 'taken': np.ones(N)}

def dpo(seed: int = 0) -> dict: # Columns
    "What a healthy run of DPO measures, 16 pairs a step."
    random = np.random.default_rng(seed)
    noisy = lambda mean, std: mean + std*random.normal(size=N)
    margin = noisy(line(0, 1.)*(np.arange(N) > 0), .2*(np.arange(N) > 0))
    chosen, rejected = -.3*margin, -1.3*margin
    return {'step': np.arange(1, N + 1), 'rewards/chosen': chosen, 'rewards/rejected': rejected, 'rewards/margins': margin,
        'rewards/accuracies': random.binomial(16, line(.55, .72))/16, 'logps/chosen': noisy(-110., 6) + 10*chosen, 'logps/rejected': noisy(-112., 6) + 10*rejected,
        'loss': np.log1p(np.exp(-margin)), 'lab/delta_chosen': 10*chosen, 'lab/delta_rejected': 10*rejected, 'lab/length_gap': noisy(1., 3.),
        'lab/eos_logp': noisy(-.8, .15), 'grad_norm': random.lognormal(0, .4, N), 'skipped': np.zeros(N), 'taken': np.ones(N)}

def rows(table: dict) -> list[dict]: return [dict(zip(table, map(float, values))) for values in zip(*table.values())]
def names(history, signs=ALL) -> set: return {finding.name for finding in examine(history, signs)}
def ever(history) -> set: return {finding.name for _, _, finding in replay(history, ALL)}

wobble = .02*np.random.default_rng(7).normal(size=N)
last = lambda n: np.arange(N) >= N - n
SICK = { # What changes in a healthy run, and which other alarms that rightly raises
    'start mismatch': (ppo, {'objective/kl': ramp(.3, 5.5)}, set()),
    'sampler mismatch': (ppo, {'lab/sampler_gap': .06 + wobble}, set()),
    'temperature mismatch': (ppo, {'objective/entropy': 28*.7*(ramp(3.7, 3.1) + wobble)}, set()),
    'negative KL': (ppo, {'objective/kl': np.append(0, -1.2 + wobble[1:])}, set()),
    'exploding KL': (ppo, {'objective/kl': ramp(0, 40) + wobble}, set()),
    'KL without end': (ppo, {'objective/kl': line(0, 15) + wobble, 'objective/scores': line(0, 3) + wobble}, set()),
    'KL for nothing': (ppo, {'objective/kl': line(0, 6) + wobble, 'objective/scores': np.minimum(line(0, 6), 2.5) + wobble}, set()),
    'price runs away': (ppo, {'lab/kl_coef': .05*1.04**np.arange(N)}, set()),
    'over budget': (ppo, {'lab/over_budget': 1.*(np.arange(N) % 3 > 0)}, set()),
    'mean ratio off': (ppo, {'val/ratio': 1.2 + wobble}, set()),
    'ratio outliers': (ppo, {'lab/ratio_off': 14 + wobble}, set()),
    'clip fraction high': (ppo, {'policy/clipfrac_avg': .5 + wobble}, set()),
    'rollouts cut short': (ppo, {'lab/updates': np.full(N, 1.), 'taken': np.full(N, .5)}, set()),
    'broken updates': (ppo, {'skipped': 1.*(np.arange(N) % 3 == 0), 'taken': 1.*(np.arange(N) % 3 > 0)}, set()),
    'gradient spikes': (ppo, {'grad_norm': np.where(np.isin(np.arange(N), (48, 57)), 60., 1 + wobble)}, set()),
    'value loss stuck': (ppo, {'loss/value_avg': .5 + wobble, 'lab/explained_variance': wobble}, set()),
    'critic worse than none': (ppo, {'lab/explained_variance': -2 + wobble, 'loss/value_avg': ramp(.5, .2)}, set()),
    'value clip high': (ppo, {'val/clipfrac_avg': .8 + wobble}, set()),
    'entropy collapse': (ppo, {'policy/entropy_avg': ramp(3.7, .4), 'objective/entropy': 28*ramp(3.7, .4)}, set()),
    'EOS never sampled': (ppo, {'lab/frac_eos': np.zeros(N)}, set()),
    'EOS dies out': (ppo, {'lab/frac_eos': ramp(.6, .05)}, set()),
    'length hacking': (ppo, {'lab/length_corr': .6 + wobble, 'lab/length': line(18, 30) + wobble, 'objective/entropy': ramp(3.7, 3.1)*line(18, 30)}, set()),
    'repeated n-grams': (ppo, {'lab/repetition': ramp(.01, .5)}, set()),
    'duplicate completions': (ppo, {'lab/distinct': ramp(1, .1)}, set()),
    'score falls': (ppo, {'objective/scores': line(1, -2) + wobble}, set()),
    'reward saturation': (ppo, {'objective/scores_std': ramp(1, .01)}, set()),
    'judges disagree': (ppo, {'lab/disagreement': ramp(.2, .9)}, set()),
    'groups all equal': (ppo, {'lab/frac_zero_std': .8 + wobble}, set()),
    'not the reference at the start': (dpo, {'lab/delta_chosen': line(-2, -3), 'lab/delta_rejected': line(-1, -13)}, set()),
    'displacement': (dpo, {'rewards/chosen': ramp(0, -8), 'rewards/rejected': ramp(0, -9.5)}, set()),
    'chosen side sinks': (dpo, {'lab/delta_chosen': ramp(0, -50), 'lab/delta_rejected': ramp(0, -80), 'logps/chosen': ramp(0, -50) - 110}, set()),
    'both sides sink': (dpo, {'lab/delta_chosen': ramp(0, -18), 'lab/delta_rejected': ramp(0, -20), 'logps/chosen': ramp(0, -18) - 110}, set()),
    'length explains the margin': (dpo, {'lab/length_gap': 30*(dpo()['rewards/margins'] - .5) + 20*wobble}, set()),
    'EOS unlearned': (dpo, {'lab/eos_logp': ramp(-.8, -4)}, set()),
    'accuracy stuck': (dpo, {'rewards/accuracies': .49 + 3*wobble}, set()),
    'margin explodes': (dpo, {'rewards/margins': ramp(0, 30)}, set()),
    'pairs learned by heart': (dpo, {'rewards/accuracies': np.ones(N), 'loss': ramp(.69, .001)}, set()),
}

def test_every_sign_is_provoked(): assert set(SICK) == {sign.name for sign in ALL}

@pytest.mark.parametrize('name', SICK)
def test_the_illness_is_called_by_its_name(name):
    make, changes, also = SICK[name]
    found = examine(rows(make() | changes), ALL)
    assert {finding.name for finding in found} == {name} | also
    [finding] = [finding for finding in found if finding.name == name]
    assert f'{finding.threshold:g}' in finding.text and f'{finding.number:.3g}' in finding.text and finding.sign.remedy in finding.text
    assert doctor_line(found).count('\n') == 0 and name in doctor_line(found)

@pytest.mark.parametrize('name', [name for name in SICK if 'start' not in name])
def test_one_bad_step_is_no_illness(name):
    make, changes, _ = SICK[name]
    healthy, sick = rows(make()), rows(make() | changes)
    assert not names(healthy[:-1] + sick[-1:]), 'at the end'
    assert not names(healthy[:-3] + sick[-3:-2] + healthy[-2:]), 'a little earlier'

@pytest.mark.parametrize('sign', ALL, ids=lambda sign: sign.name)
def test_a_sign_says_nothing_where_a_metric_is_missing_or_broken(sign):
    make, changes, _ = SICK[sign.name]
    table = make() | changes
    for name in sign.reads:
        assert sign.number(columns(rows({n: x for n, x in table.items() if n != name}))) is None
        assert sign.number(columns(rows(table | {name: np.full(N, math.nan)}))) is None
    assert sign.number(columns([])) is None and sign.number(columns(rows(table))) is not None

@pytest.mark.parametrize('make', [ppo, dpo])
def test_imagined_healthy_runs_raise_no_alarm_at_any_step(make):
    for seed in range(8): assert ever(rows(make(seed))) == set(), seed

@pytest.mark.parametrize('name', ['ppo', 'dpo', 'sft', 'reward'])
def test_real_healthy_runs_raise_no_alarm_at_any_step(name):
    "Metrics and settings of `rlhf-lab quickstart --seed 0` (SmolLM2-135M, commit e0d68a0), to five digits."
    run = Run(Path(__file__).parent/'healthy'/name)
    history = run.metrics()
    for row in history: # the log-ratios were not logged yet; rewards are β = 0.1 times them
        row |= {f'lab/delta_{side}': row[f'rewards/{side}']/.1 for side in ('chosen', 'rejected') if f'rewards/{side}' in row}
    assert len(history) >= 9 and replay(history, fitting(ALL, run)) == []

def test_steps_that_are_too_large_are_noticed_in_real_training():
    "PPO in the world of five words, at thirty times the learning rate that the notebook uses."
    from flax import nnx
    from rlhf_lab.ppo import ActorCritic, PPOConfig, practise
    from rlhf_lab.train import adamw, init_state
    from rlhf_lab.world import World
    world, optimizer = World(), adamw(3.)
    config = PPOConfig(batch_size=512, minibatches=1, epochs=4, max_new_tokens=3, kl_coef=world.beta, kl_stop=0., precision='float32')
    start = init_state(ActorCritic(world.reference), optimizer, wrt=nnx.Param)
    rollouts = practise(start, world.reference, [[0]]*512, world.reward, optimizer, config, write=world.write)
    history = [{'step': n, **measured} for n, (_, measured, _) in zip(range(1, 6), rollouts)]
    assert 'ratio outliers' in names(history)

# ── while it runs ──

def updates(table: dict): return ((types.SimpleNamespace(step=row['step']), {n: v for n, v in row.items() if n != 'step'}, 'rollout') for row in rows(table))

def test_a_new_alarm_is_said_once_and_counted(tmp_path, capsys):
    table = ppo() | {'lab/repetition': np.where(np.arange(N) < 30, .01, .5)}
    with Run(tmp_path/'run', {}) as run:
        for state, measured, rollout in watched(updates(table), run, PPO_SIGNS):
            assert rollout == 'rollout'
            run.log(state.step, measured)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and said.startswith('step 33 · repeated n-grams (0.5, alarm above 0.2): ')
    assert [row['lab/alarms'] for row in run.metrics()] == [0]*32 + [1]*(N - 32)

def test_a_resumed_run_does_not_repeat_its_alarms(tmp_path, capsys):
    table = ppo() | {'lab/repetition': np.full(N, .5)}
    with Run(tmp_path, {}) as run:
        for row in rows(table)[:40]: run.log(row['step'], row | {'lab/alarms': 1})
        later = [update for update in updates(table) if update[0].step > 40]
        seen = [measured['lab/alarms'] for _, measured, _ in watched(iter(later), run, PPO_SIGNS)]
    assert seen == [1]*20 and capsys.readouterr().err == ''

def test_who_never_learned_to_end_or_is_not_stopped_has_no_endings_to_count(tmp_path):
    for eos, stop, expected in ((True, True, {'EOS never sampled'}), (True, False, set()), (False, True, set())):
        with Run(tmp_path/f'{eos}{stop}', dict(eos=eos, stop_at_eos=stop)) as run:
            assert names(rows(ppo() | {'lab/frac_eos': np.zeros(N)}), fitting(PPO_SIGNS, run)) == expected

def test_looking_at_a_long_run_is_cheap():
    import time
    history, start = rows(dpo())*100, time.perf_counter()
    examine(history, ALL)
    assert time.perf_counter() - start < 1

# ── from the command line ──

def test_examine_prints_number_cause_and_remedy(tmp_path, capsys):
    with Run(tmp_path/'ppo', {}) as run:
        for row in rows(ppo() | {'lab/repetition': np.where((np.arange(N) > 20) & (np.arange(N) < 40), .5, .01)}): run.log(row['step'], row)
    assert main(['examine', str(run.path)]) == 0
    head, _, _, _, line = capsys.readouterr().out.strip().split('\n')
    assert f'{N} steps' in head and '1 raised an alarm' in head
    assert line.startswith('| repeated n-grams | 24 – 42 | 0.5 | above 0.2 |') and 'raise kl_coef' in line

def test_a_folder_without_metrics_is_one_line(tmp_path, capsys):
    (tmp_path/'broken').mkdir()
    (tmp_path/'broken/metrics.jsonl').write_text('{"step": 1}\nno json\n')
    for folder, words in ((tmp_path, f'give the folder of a run: {tmp_path}/broken'), (tmp_path/'nowhere', 'holds no metrics'), (tmp_path/'broken', 'is damaged')):
        assert main(['examine', str(folder)]) == 3
        err = capsys.readouterr().err
        assert err.startswith('error: ') and err.count('\n') == 1 and words in err

def test_where_completions_were_cut_off_nobody_misses_their_end(tmp_path):
    ending = [sign for sign in DPO_SIGNS if 'lab/eos_logp' in sign.reads]
    for eos, expected in ((True, ending), (False, [])):
        with Run(tmp_path/str(eos), dict(eos=eos)) as run:
            assert ending and [sign for sign in fitting(DPO_SIGNS, run) if sign in ending] == expected
