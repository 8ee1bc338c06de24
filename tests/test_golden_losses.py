"Losses, advantages, adapters and whole trainings are those of TRL, HALOs, peft and of the papers' own code."
import dataclasses, functools, json, os, re, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import jax, jax.numpy as jnp, numpy as np, optax, pytest
from flax import nnx
from rlhf_lab.core import Batch, LabError, Pairs, Rollout, masked_mean, whiten
from rlhf_lab.dpo import cdpo, dpo_loss, reference_logprobs
from rlhf_lab.generate import generate
from rlhf_lab.lora import LoRA, add_head, add_lora, merge_lora
from rlhf_lab.model import Linear, score_tokens
from rlhf_lab.ppo import (ActorCritic, AdaptiveKL, PPOConfig, add_advantages, appraise, check_ratio, check_start, clipped_surrogate,
    clipped_value_loss, describe, ended, gae, last_slot, ppo_loss, practise, shaped_rewards)
from rlhf_lab.reward import bradley_terry
from rlhf_lab.train import fit, init_state, make_step
from rlhf_lab.weights import config_from_hf, fill

golden = Path(__file__).parent/'golden'
double = jax.config.jax_enable_x64
kind = 'float64' if double else 'float32'
exact, rough = (1e-10, 1e-6) if double else (1e-5, 1e-5) # rough: where the reference itself used float32 for a constant

@functools.cache
def load(name): return dict(np.load(golden/f'{name}.npz'))
def seeds(name, *place): return sorted({m[1] for k in load(name) if (m := re.match('/'.join([*place, r'(s\d+)/']), k))})
def each(name, *place): return pytest.mark.parametrize('seed', seeds(name, *place))
def array(x): return np.asarray(x, kind if np.asarray(x).dtype.kind == 'f' else None)

def close(found, expected, tolerance=exact):
    expected = np.asarray(expected)
    assert np.abs(np.asarray(found) - expected).max() <= tolerance*max(1, np.abs(expected).max())

@functools.cache
def compiled(f): return nnx.jit(f)
def ask(f, *args): return compiled(f)(*args)

class Saying:
    "A model whose hidden states are given, and its logits with them."
    split, layers, dtype = 0, (), kind
    def __init__(self, states, head=None): self.states, self.unembed, self.head = states, jnp.eye(states.shape[-1], dtype=kind), head
    def hidden(self, batch): return self.states

def sides(tokens, mask, **extra):
    "Chosen rows and rejected rows as pairs."
    N = len(tokens)//2
    tokens, mask = jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, bool)
    return Pairs(Batch(tokens[:N], mask[:N]), Batch(tokens[N:], mask[N:]), **extra)

@pytest.fixture(autouse=True, scope='module')
def compile_quickly():
    "Twice as fast here: there is much to compile and little to compute."
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)

@pytest.mark.skipif(double, reason='this is the float64 run')
def test_all_of_this_in_float64():
    "The same tests, to 1e-10."
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', __file__],
        env=dict(os.environ, JAX_ENABLE_X64='1', JAX_PLATFORMS='cpu'), cwd=golden.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]

# ── DPO ──

@each('dpo_family')
@pytest.mark.parametrize('name, beta', [('sigmoid', .1), ('sigmoid_b05', .5)])
def test_dpo_from_logprobs(seed, name, beta):
    z = load('dpo_family')
    logps, ref, mask = array(z[f'{seed}/policy_per_token_logps']), array(z[f'{seed}/ref_per_token_logps']), z[f'{seed}/completion_mask'][:, 1:]
    @jax.jit
    @jax.value_and_grad
    def loss(logps):
        chosen, rejected = jnp.split(((logps - ref)*mask).sum(1), 2)
        return bradley_terry(beta*(chosen - rejected)).mean()
    value, grad = loss(logps)
    close(value, z[f'{seed}/{name}/loss'])
    close(grad, z[f'{seed}/{name}/grad_policy_per_token_logps'])

@functools.partial(jax.jit, static_argnames='loss')
def ask_pairs(policy, reference, pairs, loss):
    "Pairs with their reference, the loss of each, and the slope and the metrics of their sum."
    pairs = reference_logprobs(Saying(reference), pairs)
    weighed = lambda logits, weight: (lambda total, _, seen: (total, seen))(*dpo_loss(Saying(logits), pairs.replace(weight=weight), .1, loss))
    losses = jax.lax.map(lambda weight: weighed(policy, weight)[0], jnp.eye(len(pairs.ref_chosen)))
    return pairs, losses, jax.grad(weighed, has_aux=True)(policy, jnp.ones(len(losses)))

@each('dpo_peers_from_logits')
@pytest.mark.parametrize('loss, names', [(bradley_terry, ['mitchell/dpo_b0.1', 'halos/DPOTrainer']),
    (functools.partial(cdpo, flipped=.2), ['mitchell/cdpo_b0.1_ls0.2', 'halos/CDPOTrainer'])], ids=['dpo', 'cdpo'])
def test_dpo_from_logits(seed, loss, names):
    "Through `dpo_loss` itself: alignment, mask, sums, margins and gradients."
    z = load('dpo_peers_from_logits')
    pairs = sides(z[f'{seed}/input_ids'], z[f'{seed}/completion_mask'])
    policy, reference = (array(z[f'{seed}/{who}_logits']) for who in ('policy', 'ref'))
    pairs, losses, (grad, seen) = ask_pairs(policy, reference, pairs, loss)
    close(jnp.concatenate([pairs.ref_chosen, pairs.ref_rejected]), z[f'{seed}/ref_sum_logps'])
    close(jnp.stack([seen['logps/chosen'][0], seen['logps/rejected'][0]]), z[f'{seed}/policy_sum_logps'].reshape(2, -1).sum(1))
    for name in names: close(losses, z[f'{seed}/{name}/losses'])
    if (key := f'{seed}/{names[0]}/grad_policy_logits_of_mean') in z: close(grad/len(losses), z[key])

@pytest.mark.parametrize('loss', [bradley_terry, cdpo, functools.partial(cdpo, flipped=.4)], ids=['dpo', 'cdpo', 'cdpo .4'])
def test_dpo_starts_at_ln_2_and_pulls_evenly(loss):
    "And no gradient reaches the prompt, the padding or the reference."
    z = load('dpo_peers_from_logits')
    pairs, logits = sides(z['s0/input_ids'], z['s0/completion_mask']), array(z['s0/policy_logits'])
    pairs, losses, (grad, seen) = ask_pairs(logits, logits, pairs, loss)
    close(losses, np.full(len(losses), np.log(2)), exact/10)
    assert all(seen[f'rewards/{name}'][0] == 0 for name in ('chosen', 'rejected', 'margins'))
    if loss is bradley_terry:
        N, slope = len(pairs.ref_chosen), jax.grad(lambda chosen, rejected: bradley_terry(.1*(chosen - rejected)).mean(), (0, 1))
        for found, sign in zip(slope(pairs.ref_chosen, pairs.ref_chosen), (-1, 1)): close(found, np.full(N, sign*.1/2/N))
    used = np.pad(z['s0/completion_mask'][:, 1:] > 0, ((0, 0), (0, 1)))
    assert (np.asarray(grad)[~used] == 0).all() and (np.abs(grad).sum(-1)[used] > 0).all()

# ── whole trainings ──

@functools.cache
def tiny():
    z, config = load('tiny_lm'), json.loads((golden/'tiny_lm.gpt2.config.json').read_text())
    return fill(config_from_hf(config), lambda name: z[f'gpt2/weights/{name}'], kind)

@functools.cache
def optimizer_and_step(name):
    optimizer = dict(sgd=optax.sgd(.05), adam=optax.adam(1e-3))[name]
    return optimizer, make_step(dpo_loss, optimizer)

@each('dpo_trajectory')
@pytest.mark.parametrize('name', ['sigmoid_sgd', 'sigmoid_adam'])
def test_fifteen_updates_of_dpo(seed, name):
    "Model, loss, step and loop together follow TRL and transformers, more padding or less; Adam amplifies round-off."
    z, (optimizer, step) = load('dpo_trajectory'), optimizer_and_step(name.removeprefix('sigmoid_'))
    tokens, mask = (np.pad(z[f'{seed}/{key}'], ((0, 0), (0, 16 - z[f'{seed}/{key}'].shape[1]))) for key in ('input_ids', 'completion_mask'))
    pairs = ask(reference_logprobs, tiny(), sides(tokens, mask))
    expected, names = z[f'{seed}/{name}/trace'], ['loss', *(f'rewards/{x}' for x in ('chosen', 'rejected', 'margins', 'accuracies')), 'logps/chosen', 'logps/rejected']
    rows = []
    for state, seen in fit(init_state(tiny(), optimizer), step, [pairs]*len(expected)): rows.append([seen[n] for n in names])
    keep = [i for i, n in enumerate(names) if n != 'rewards/accuracies']
    tolerance = exact if double else 1e-4
    close(np.array(rows)[:, keep], expected[:, keep], tolerance)
    close(np.array(rows)[1:, 4], expected[1:, 4], 1e-6)
    close(state.model.embed[...], z[f'{seed}/{name}/final_wte'], tolerance)

# ── PPO ──

def column(z, seed): return {name: array(z[f'{seed}/{name}']) for name in ('logprobs', 'ref_logprobs', 'values', 'scores', 'new_logprobs', 'vpred')}

CONFIGS = {'g1_l0.95': (1., .95, False, 0.), 'g1_l0.95_whiten': (1., .95, True, 1.), 'g0.99_l0.9_k3': (.99, .9, False, 1.)}

@each('ppo_lm')
@pytest.mark.parametrize('who, ddof, name', [('trl', 1, name) for name in CONFIGS] + [('sffd', 0, name) for name in CONFIGS if 'k3' not in name])
def test_rewards_advantages_and_losses(seed, name, who, ddof):
    """TRL and Summarize-from-Feedback give the score and a value to one slot after the last token. For us that is a longer mask.
    Where they estimate KL otherwise, or replace scores, the test does it, too."""
    z, (gamma, lam, white, penalty) = load('ppo_lm'), CONFIGS[name]
    out, x = (lambda key: z[f'{seed}/{who}/{name}/{key}']), column(z, seed)
    last, done = z[f'{seed}/sequence_lengths_index_of_last_token'], (z[f'{seed}/responses'] == 2).any(1)
    mask, longer = (np.arange(x['values'].shape[1]) <= end[:, None] for end in (last, last + 1))
    scores = jnp.where(done | (penalty == 0), x['scores'], x['scores'] - penalty if who == 'trl' else -penalty)
    close(scores, out('scores_after_penalty'))
    loose = rough if white or who == 'trl' else exact

    @jax.jit
    def advantages_of(x, mask, longer, scores):
        price = jnp.where(mask, x['logprobs'] - x['ref_logprobs'], 0)
        if name.endswith('k3'): price = jnp.where(mask, jnp.exp(-price) - 1 + price, 0)
        rewards = shaped_rewards(price, jnp.zeros_like(price), longer, scores, .05)
        if white: rewards = whiten(rewards, longer, shift_mean=False, ddof=ddof)
        advantages, returns = gae(rewards, x['values'], longer, gamma, lam)
        return dict(rewards=rewards, returns=returns, advantages=whiten(advantages, mask, ddof=ddof))
    for key, found in advantages_of(x, mask, longer, scores).items(): close(found, out(key), loose)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def losses(new, guess, advantages, returns):
        policy = masked_mean(clipped_surrogate(new, jnp.where(mask, x['logprobs'], 0), advantages), mask)
        value = masked_mean(clipped_value_loss(guess, x['values'], returns), longer)
        return policy + .1*value, (policy, value)
    (total, parts), slopes = losses(x['new_logprobs'], x['vpred'], array(out('advantages')), array(out('returns')))
    for key, found in zip(('loss', 'pg_loss', 'vf_loss'), (total, *parts)): close(found, out(key))
    close(slopes[0]*mask, out('grad_new_logprobs')*mask)
    close(slopes[1]*longer, out('grad_vpred')*longer)

def saying(logprobs, tokens):
    "A model that gives each token the log-probability it is told to, and the prompt token before them nothing."
    V = int(tokens.max()) + 2
    told = jnp.where(jax.nn.one_hot(tokens, V, dtype=bool), logprobs[..., None], -1e9)
    told = told.at[..., -1].set(jnp.log1p(-jnp.exp(logprobs)))
    return Saying(jnp.pad(told, ((0, 0), (0, 1), (0, 0))))

@each('ppo_lm')
@pytest.mark.parametrize('name', ['whiten', 'nowhiten'])
def test_ppo_loss_is_that_of_the_first_rlhf_paper(seed, name):
    "LM Human Preference Details: no mask, the score in the last slot; through `add_advantages` and `ppo_loss` themselves."
    z = load('ppo_lm')
    out, x = (lambda key: z[f'{seed}/lmhp_details/{name}/{key}']), column(z, seed)
    B, T = x['values'].shape
    right = lambda a, fill=0: jnp.pad(a, ((0, 0), (1, 0)), constant_values=fill) # one prompt token before them
    tokens = z[f'{seed}/responses'].astype('int32')
    rollout = Rollout(right(tokens), right(jnp.ones((B, T), bool)), logprobs=right(x['logprobs']), ref_logprobs=right(x['ref_logprobs']), values=right(x['values']))
    rollout = jax.jit(lambda rollout: add_advantages(rollout, x['scores'], .15, PPOConfig(whiten_rewards=name == 'whiten')))(rollout)
    for key in ('rewards', 'advantages', 'returns'): close(getattr(rollout, key)[:, 1:], out(key))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(new, guesses): # log-probabilities are moved below 0; only their differences count
        actor = SimpleNamespace(policy=saying(new - 2, tokens), values=lambda batch, hidden: right(guesses))
        total, weight, seen = ppo_loss(actor, rollout.replace(logprobs=right(x['logprobs'] - 2)), value_weight=.1)
        return total/weight, {key: a/b for key, (a, b) in seen.items()}
    (total, seen), grads = loss(x['new_logprobs'], x['vpred'])
    for found, key in [(total, 'loss'), (seen['loss/policy_avg'], 'pg_loss'), (seen['loss/value_avg'], 'vf_loss')]: close(found, out(key))
    for found, key in zip(grads, ('grad_new_logprobs', 'grad_vpred')): close(found, out(key))
    close(seen['policy/clipfrac_avg'], out('pg_clipfrac'), 1e-6)
    close(seen['val/clipfrac_avg'], out('vf_clipfrac'), 1e-6)

whiten_now = jax.jit(whiten, static_argnums=(2, 3))

@each('ppo_lm', 'whiten')
def test_whitening(seed):
    z = load('ppo_lm')
    x, mask = array(z[f'whiten/{seed}/x']), z[f'whiten/{seed}/mask']
    for shift in (0, 1):
        close(whiten_now(x, mask, bool(shift), 1)*mask, z[f'whiten/{seed}/trl_bessel_shift{shift}']*mask, rough)
        close(whiten_now(x, mask, bool(shift))*mask, z[f'whiten/{seed}/sffd_population_shift{shift}']*mask)
        close(whiten_now(x, np.ones_like(mask), bool(shift)), z[f'whiten/{seed}/lmhp_unmasked_population_shift{shift}'])

@each('ppo_lm', 'adaptive_kl')
def test_adaptive_kl(seed):
    z = load('ppo_lm')
    kl, found = AdaptiveKL(.15, 6., 10_000), []
    for observed in z[f'adaptive_kl/{seed}/observed_kl']:
        kl.update(float(observed), 512)
        found.append(kl.coef)
    assert np.abs(found - z[f'adaptive_kl/{seed}/coef_after']).max() < 1e-12

# ── LoRA ──

@each('efficiency')
def test_lora_is_that_of_peft(seed):
    z = load('efficiency')
    W, b, A, B, x = (array(z[f'{seed}/lora_a16/{name}']) for name in 'W b A B x'.split())
    linear = Linear(*W.T.shape, bias=True, dtype=kind, key=jax.random.key(0))
    linear.weight[...], linear.bias[...] = W.T, b
    linear.lora = LoRA(*W.T.shape, rank=len(A), alpha=16., dtype=kind, key=jax.random.key(0))
    assert linear.lora.scale == z[f'{seed}/lora_a16/scaling']
    linear.lora.a[...], linear.lora.b[...] = A.T, B.T
    grads = nnx.grad(lambda linear: (linear(x)**2).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(linear)
    close(linear(x), z[f'{seed}/lora_a16/y'])
    close((linear.weight[...] + linear.lora.change).T, z[f'{seed}/lora_a16/merged_W'])
    for name in 'AB': close(grads['lora'][name.lower()][...].T, z[f'{seed}/lora_a16/grad_{name}'])

def test_a_fresh_adapter_is_kaiming_uniform_and_says_nothing():
    lora = LoRA(400, 30, rank=64, alpha=16., dtype=kind, key=jax.random.key(0))
    assert (lora.b[...] == 0).all() and jnp.abs(lora.a[...]).max() <= 400**-.5
    assert abs(lora.a[...].std()*400**.5*3**.5 - 1) < .02 # of a uniform distribution on ±1/√in

# ── defects seen elsewhere: nothing new to say in float64 ──

once = pytest.mark.skipif(double, reason='was tested in float32')

@functools.cache
def rollout_of(temperature=1., new=6):
    "Eight sampled completions of the tiny GPT-2, and what policy, critic and reference think of them."
    actor = ActorCritic(add_head(add_lora(tiny(), key=jax.random.key(3), rank=2), key=jax.random.key(4), std=0.))
    prompts = [[1, 5, 9], [1, 7], [3, 4, 5, 6], [8, 8]]*2
    sampled = generate(merge_lora(actor.policy), prompts, key=jax.random.key(5), max_new_tokens=new, temperature=temperature, stop=(2, 6))
    return actor, sampled, ask(appraise, actor, tiny(), Batch(sampled.tokens, sampled.mask), jnp.float32(temperature))

@once
def test_a_reward_keeps_its_fraction():
    "R1: nothing truncates a learned reward, not even next to integers."
    mask = jnp.array([[0, 1, 1, 0], [0, 1, 1, 1]], bool)
    zeros, scores = jnp.zeros(mask.shape), jnp.array([.99, -2.7])
    for given in (scores, np.asarray(scores), list(map(float, scores))):
        close(shaped_rewards(zeros, zeros, mask, given, .1).sum(1), scores, 1e-6)
    assert jnp.issubdtype(shaped_rewards(zeros, zeros, mask, jnp.array([1, -2]), .1).dtype, jnp.floating)
    close(gae(shaped_rewards(zeros, zeros, mask, scores, .1), zeros, mask, 1., 1.)[1][:, 1], scores, 1e-6)

@once
@pytest.mark.parametrize('temperature', [.5, .7, .9, 1., 1.3])
def test_a_policy_that_is_the_reference_is_zero_nats_away_from_it(temperature):
    "R2: at any temperature; the price in the reward is 0, too."
    _, _, rollout = rollout_of(temperature)
    assert (rollout.logprobs == rollout.ref_logprobs).all()
    rewards = shaped_rewards(rollout.logprobs, rollout.ref_logprobs, rollout.mask, jnp.zeros(len(rollout.mask)), .1)
    assert (rewards == 0).all()

@once
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

@once
def test_epochs_are_passes():
    "R4: updates = rollouts × epochs × minibatches, and the ratio moves after the first."
    calls, measured = practised()
    assert calls == 2*3*2 and [m['lab/updates'] for m in measured] == [6, 6]
    assert all(m['policy/approxkl_avg'] > 1e-6 and m['lab/ratio_off'] > 1e-3 for m in measured)
    assert all(m['lab/sampler_gap'] < 1e-5 for m in measured)

@once
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

@once
def test_what_ends_a_completion_is_what_was_configured():
    "R6: a penalty for a missing stop token looks for the stop tokens that sampling used, at the end only."
    tokens = jnp.array([[1, 5, 9, 0], [1, 5, 2, 0], [1, 9, 5, 5], [1, 9, 9, 9]])
    mask = jnp.array([[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], bool)
    assert ended(Rollout(tokens, mask), (9,)).tolist() == [True, False, False, False]
    assert ended(Rollout(tokens, mask), (2, 9)).tolist() == [True, True, False, False]
    assert ended(Rollout(tokens, mask), ()).tolist() == [False]*4

@once
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
