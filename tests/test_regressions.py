"Defects seen in other implementations, each with a test that would have caught it. What has its own file: IPO's two means (DPO), settings nobody reads (house)."
import dataclasses, functools
import jax, jax.numpy as jnp, numpy as np, optax, pytest
from flax import nnx
from goldens import ask, close, tiny
from rlhf_lab.config import parse
from rlhf_lab.core import Batch, LabError, Rollout, UsageError
from rlhf_lab.generate import generate
from rlhf_lab.lora import add_head, add_lora, merge_lora
from rlhf_lab.model import ModelConfig, Transformer
from rlhf_lab.online import add_group_advantages, contest, duel_loss, grpo_advantages, grpo_loss, online_loss, rloo_advantages
from rlhf_lab.ppo import (ActorCritic, PPOConfig, add_advantages, appraise, assess, check_ratio, check_start, describe, ended, gae, ppo_loss, practise, shaped_rewards)
from rlhf_lab.practise import OnlineConfig, train_online, train_ppo
from rlhf_lab.runs import Run
from rlhf_lab.sft import sft_loss
from rlhf_lab.train import adamw, init_state, make_step

@functools.cache
def rollout_of(temperature=1., new=6):
    "Eight sampled completions of the tiny GPT-2, and what policy, critic and reference think of them."
    actor = ActorCritic(add_head(add_lora(tiny(), key=jax.random.key(3), rank=2), key=jax.random.key(4), std=0.))
    prompts = [[1, 5, 9], [1, 7], [3, 4, 5, 6], [8, 8]]*2
    sampled = generate(merge_lora(actor.policy), prompts, key=jax.random.key(5), max_new_tokens=new, temperature=temperature, stop=(2, 6))
    return actor, sampled, ask(appraise, actor, tiny(), Batch(sampled.tokens, sampled.mask), jnp.float32(temperature))

def test_a_reward_keeps_its_fraction():
    "R1: nothing truncates a learned reward, not even next to integers."
    mask = jnp.array([[0, 1, 1, 0], [0, 1, 1, 1]], bool)
    zeros, scores = jnp.zeros(mask.shape), jnp.array([.99, -2.7])
    for given in (scores, np.asarray(scores), list(map(float, scores))):
        close(shaped_rewards(zeros, zeros, mask, given, .1).sum(1), scores, 1e-6)
    assert jnp.issubdtype(shaped_rewards(zeros, zeros, mask, jnp.array([1, -2]), .1).dtype, jnp.floating)
    close(gae(shaped_rewards(zeros, zeros, mask, scores, .1), zeros, mask, 1., 1.)[1][:, 1], scores, 1e-6)

@pytest.mark.parametrize('temperature', [.5, .7, .9, 1., 1.3])
def test_a_policy_that_is_the_reference_is_zero_nats_away_from_it(temperature):
    "R2: at any temperature; the price in the reward is 0, too."
    _, _, rollout = rollout_of(temperature)
    assert (rollout.logprobs == rollout.ref_logprobs).all()
    rewards = shaped_rewards(rollout.logprobs, rollout.ref_logprobs, rollout.mask, jnp.zeros(len(rollout.mask)), .1)
    assert (rewards == 0).all()

@pytest.mark.parametrize('temperature', [.7, 1., 1.3])
def test_sampling_and_scoring_agree(temperature):
    "R3, R11: what was sampled is what is scored, cached or not; PPO offers no other sampling."
    _, sampled, rollout = rollout_of(temperature)
    assert jnp.abs(jnp.where(sampled.mask, sampled.logprobs - rollout.logprobs, 0)).max() < 1e-5
    assert not {'top_k', 'top_p', 'min_p'} & {field.name for field in dataclasses.fields(PPOConfig)}

@functools.cache
def practised(**settings):
    "Two rollouts of PPO: how often the optimizer was asked, and what was measured."
    config, calls = PPOConfig(batch_size=8, minibatches=2, epochs=3, max_new_tokens=6, kl_stop=0., precision='float32', **settings), []
    actor, optimizer = rollout_of()[0], optax.adam(.02)
    counted = optax.GradientTransformation(optimizer.init, lambda *args: (jax.debug.callback(lambda: calls.append(1)), optimizer.update(*args))[1])
    prompts = [[1, 5, 9], [1, 7], [3, 4, 5, 6], [8, 8]]*4
    reward = lambda rollout: (np.asarray(rollout.tokens) == 6).sum(1)/3.
    found = practise(init_state(actor, counted), tiny(), prompts, reward, counted, config, (6,))
    measured = [next(found)[1] for _ in range(2)]
    jax.effects_barrier()
    return len(calls), measured

def test_epochs_are_passes():
    "R4: updates = rollouts × epochs × minibatches, and the ratio moves after the first."
    calls, measured = practised()
    assert calls == 2*3*2 and [m['lab/updates'] for m in measured] == [6, 6]
    assert all(m['policy/approxkl_avg'] > 1e-6 and m['lab/ratio_off'] > 1e-3 for m in measured)
    assert all(m['lab/sampler_gap'] < 1e-5 for m in measured)

def test_padding_changes_no_measurement():
    "R5: approximate KL, entropy, ratio and clip fractions are means over tokens, not over slots."
    actor, _, rollout = rollout_of()
    scores, done = jnp.arange(8.), ended(rollout, (2, 6))
    rollout = rollout.replace(logprobs=jnp.where(rollout.mask, rollout.logprobs + .3*jnp.sin(rollout.tokens), 0))
    rollout = add_advantages(rollout, scores, .1, PPOConfig())
    wider = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 9))), rollout)
    wider = wider.replace(tokens=wider.tokens.at[:, -9:].set(7))
    for given in (rollout, wider): assert given.advantages.shape == given.tokens.shape
    (total, weight, seen), (total2, weight2, seen2) = (ask(ppo_loss, actor, given) for given in (rollout, wider))
    close(total2, total), close(weight2, weight)
    for name in seen: close(seen2[name][0]/seen2[name][1], seen[name][0]/seen[name][1])
    assert seen['policy/approxkl_avg'][0] > 0 and seen['policy/clipfrac_avg'][0] > 0
    for (name, a), b in zip(describe(rollout, scores, done, .1).items(), describe(wider, scores, done, .1).values()): close(b, a)

def test_what_ends_a_completion_is_what_was_configured():
    "R6: a penalty for a missing stop token looks for the stop tokens that sampling used, at the end only."
    tokens = jnp.array([[1, 5, 9, 0], [1, 5, 2, 0], [1, 9, 5, 5], [1, 9, 9, 9]])
    mask = jnp.array([[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], bool)
    assert ended(Rollout(tokens, mask), (9,)).tolist() == [True, False, False, False]
    assert ended(Rollout(tokens, mask), (2, 9)).tolist() == [True, True, False, False]
    assert ended(Rollout(tokens, mask), ()).tolist() == [False]*4

def test_before_the_first_update_the_ratio_is_one_and_the_loss_zero():
    "R12, and the run stops with a named cause where it is not so."
    actor, _, rollout = rollout_of()
    check_start(rollout, 'float32')
    rollout = add_advantages(rollout, jnp.arange(8.), .1, PPOConfig())
    seen = {name: float(a/b) for name, (a, b) in ask(ppo_loss, actor, rollout)[2].items()}
    assert abs(seen['loss/policy_avg']) < 1e-6 and seen['policy/approxkl_avg'] < 1e-10 and seen['policy/clipfrac_avg'] == 0
    other = {name: float(a/b) for name, (a, b) in ask(ppo_loss, actor, rollout, jnp.float32(.8))[2].items()}
    for precision in ('float32', 'bfloat16'):
        check_ratio(seen, precision)
        with pytest.raises(LabError, match='temperature'): check_ratio(other, precision)
    with pytest.raises(LabError, match='adapter'): check_start(rollout.replace(logprobs=rollout.logprobs + .01*rollout.mask), 'float32')

# ── a run that was cut off (R7) ──

WAYS = {'PPO': (train_ppo, PPOConfig(kl_target=.001, kl_horizon=64, kl_budget=1e-6, over_budget='rollback', epochs=2)),
    'hybrid': (train_online, OnlineConfig(method='hybrid', group=4, kl_target=.001, kl_horizon=64))}

@pytest.mark.parametrize('way', ['PPO', pytest.param('hybrid', marks=pytest.mark.slow)])
def test_a_run_cut_off_anywhere_ends_where_an_undisturbed_one_ends(way, toy, tmp_path):
    "R7: parameters, optimizer, random keys, prompts, price of a nat, and where a budget goes back to."
    train, config = WAYS[way]
    (tmp_path/'asked.jsonl').write_text('\n'.join(f'{{"prompt": "Film {i} was"}}' for i in range(16)))
    config = dataclasses.replace(config, model=toy, data=str(tmp_path/'asked.jsonl'), rank=2, batch_size=16, minibatches=2, max_new_tokens=4, steps=5, save_every=1,
        kl_stop=0., learning_rate=3e-2, precision='float32', stop_at_eos=False)
    calls = []
    def reward(rollout, broken=None):
        calls.append(1)
        if len(calls) == broken: raise KeyboardInterrupt
        return (np.asarray(rollout.tokens)%3 == 0).sum(1).astype('float32')
    whole = train(dataclasses.replace(config, out=f'{tmp_path}/whole'), reward)
    half = dataclasses.replace(config, out=f'{tmp_path}/half')
    calls.clear()
    with pytest.raises(KeyboardInterrupt): train(half, functools.partial(reward, broken=4))
    again = train(dataclasses.replace(half, resume=True), reward)
    rows, resumed = (Run(tmp_path/name).metrics() for name in ('whole', 'half'))
    assert [row['step'] for row in rows] == [1, 2, 3, 4, 5] and len({row['lab/kl_coef'] for row in rows}) > 1
    assert rows == resumed
    if way == 'PPO': assert any(row['lab/over_budget'] for row in rows)
    for a, b in zip(*(jax.tree.leaves(nnx.state(merge_lora(p))) for p in (whole, again))): np.testing.assert_array_equal(a, b)

# ── names (R9) ──

@pytest.mark.parametrize('flags', ['--method=gppo', '--aggregate=mean', '--kl-in=k4', '--surrogate=clipped', '--ratio=word', '--over-budget=ignore', '--adam=adamw',
    '--method=grpo --kl-target=6', '--method=online-dpo --kl-target=6', '--separate-critic', '--group=1', '--recipe=openai-2019'])
def test_what_is_not_offered_is_refused_and_not_replaced(flags):
    "R9: an unknown name, or two settings that do not go together."
    with pytest.raises(UsageError): parse('online', OnlineConfig, flags.split())

# ── judges that fail ──

@functools.cache
def taught(method, scores):
    "One update on eight completions with these scores, in groups of four: the parameters, and what was measured."
    config = PPOConfig(batch_size=8, minibatches=1, max_new_tokens=4, kl_stop=0., precision='float32')
    actor, optimizer = ActorCritic(rollout_of()[0].policy), optax.sgd(.1)
    losses = {'grpo': functools.partial(grpo_loss, kl_coef=.1), 'online-dpo': functools.partial(duel_loss, group=4)}
    prepare = lambda rollout, scores, kl_coef: contest(add_group_advantages(rollout, scores, 0., functools.partial(grpo_advantages, group=4)), scores, 4)
    found = practise(init_state(actor, optimizer), tiny(), [[1, 5, 9], [1, 7]], lambda _: np.array(scores), optimizer, config, (6,), prepare=prepare,
        loss=functools.partial(online_loss, loss=losses[method]), group=4)
    state, measured, _ = next(found)
    return jax.tree.leaves(state.params), measured

nan = float('nan')

@pytest.mark.parametrize('method', ['grpo', 'online-dpo'])
def test_a_completion_without_a_score_is_counted_and_no_nan_reaches_the_parameters(method):
    params, measured = taught(method, (1., nan, 3., 2., nan, nan, nan, 5.))
    assert measured['lab/unscored'] == 4 and measured['lab/frac_zero_std'] == .5 and not measured['skipped']
    assert all(np.isfinite(p).all() for p in params) and all(np.isfinite(x) for x in measured.values())
    fixed, _ = taught(method, (1., 1.5, 3., 2., 7., 7., 7., 7.)) # a group without a difference teaches as little as one without scores
    if method == 'online-dpo': assert all((a == b).all() for a, b in zip(params, fixed))

def test_ties_are_dropped_and_counted():
    before = jax.tree.leaves(init_state(ActorCritic(rollout_of()[0].policy), optax.sgd(.1)).params)
    params, measured = taught('online-dpo', (2.,)*8)
    assert measured['lab/pairs'] == 0 and measured['lab/frac_zero_std'] == 1
    assert all((a == b).all() for a, b in zip(before, params))

@pytest.mark.parametrize('scores, words', [((nan,)*8, '8 of 8'), ((1., float('inf'), *(1.,)*6), '1 of 8'), ((1.,)*7, 'must return 8 numbers')])
def test_a_judge_that_cannot_be_used_is_named(scores, words):
    with pytest.raises(LabError, match=words): taught('grpo', scores)

def test_ppo_takes_no_score_that_is_none():
    with pytest.raises(LabError, match='2 of 8 completions'): assess(lambda _: [1., nan]*2 + [1., 2., 3., 4.], rollout_of()[2], (6,), PPOConfig())

def test_groups_are_whole():
    with pytest.raises(LabError, match='6 completions do not make groups of 4'): rloo_advantages(jnp.ones(6), 4)

@pytest.mark.parametrize('switch', ['remat', 'scan'])
@pytest.mark.parametrize('top', [None, 2])
def test_memory_switches_work_on_a_frozen_trunk(switch, top):
    "`nnx.remat` raised TraceContextError where only adapters learn, which is the default."
    found, batch = [], Batch(jnp.arange(24).reshape(2, 12), jnp.ones((2, 12), bool))
    for on in (False, True):
        model = Transformer(ModelConfig(50, 16, 4, 2, 1, 8, 32), key=jax.random.key(0))
        setattr(model, switch, on)
        role, optimizer = add_lora(model, key=jax.random.key(1), rank=2, top=top), adamw(1e-3)
        state, step = init_state(role, optimizer), make_step(sft_loss, optimizer)
        for _ in range(2): state, measured = step(state, batch)
        found.append((float(measured['loss']), float(measured['grad_norm'])))
    np.testing.assert_allclose(*found, rtol=1e-5)
