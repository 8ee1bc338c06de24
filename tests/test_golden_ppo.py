"Rewards, advantages, losses, controllers and Adam of PPO are those of TRL, of OpenAI and of who wrote their recipes down."
from types import SimpleNamespace
import jax, jax.numpy as jnp, numpy as np, optax, pytest
import functools
from goldens import Saying, array, close, double, each, exact, in_float64, load, rough
from rlhf_lab.core import Rollout, masked_mean, whiten
from rlhf_lab.ppo import AdaptiveKL, PPOConfig, add_advantages, clipped_surrogate, clipped_value_loss, gae, ppo_loss, read_until, shaped_rewards
from rlhf_lab.train import adamw, tf_adam

@pytest.mark.skipif(double, reason='this is the float64 run')
@pytest.mark.slow
def test_all_of_this_in_float64(): in_float64(__file__)

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
    "OpenAI's code and LM Human Preference Details: no mask, the score in the last slot; through `add_advantages` and `ppo_loss` themselves."
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

    tf = lambda key: load('ppo_openai_tf')[f'{seed}/openai_tf/{name}/{key}'] # the authors' own code, with nothing rewritten
    for found, key in [(total, 'loss/total'), (seen['loss/policy_avg'], 'loss/policy'), (seen['loss/value_avg'], 'loss/value'),
        (seen['policy/approxkl_avg'], 'policy/approxkl'), (rollout.returns[:, 1:].mean(), 'returns/mean'), (rollout.returns[:, 1:].var(), 'returns/var')]: close(found, tf(key))
    for found, key in zip(grads, ('grad_new_logprobs', 'grad_vpred')): close(found, tf(key))
    for key in ('policy/clipfrac', 'val/clipfrac'): close(seen[f'{key}_avg'], tf(key), 1e-6)

@each('ppo_lm')
def test_the_judge_reads_up_to_the_first_late_full_stop(seed):
    "LM Human Preference Details: token 5 stops from place 3 on, and what follows is padding."
    z = load('ppo_lm')
    said = np.pad(z[f'{seed}/responses'], ((0, 0), (1, 0)), constant_values=1).astype('int32') # one prompt token before them
    read = read_until(Rollout(jnp.asarray(said), jnp.arange(said.shape[1]) > jnp.zeros((len(said), 1))), (5,), 3)
    assert (np.where(read.mask, said, 0)[:, 1:] == z[f'{seed}/lmhp_details/truncate_tok5_after3']).all()

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

@each('efficiency', 'adam')
@pytest.mark.parametrize('name, rule', [('torch', optax.adamw), ('tf', tf_adam)])
def test_adam(seed, name, rule):
    "Both kinds, from 0, with ε large enough to matter."
    z = load('efficiency')
    optimizer, x = adamw(1e-2, max_grad_norm=0., eps=1e-5, rule=rule), jnp.zeros(4, array(0.).dtype)
    def one(carry, grad):
        x, state = carry
        change, state = optimizer.update(grad, state, x)
        return (x + change, state), x + change
    found = jax.jit(lambda grads: jax.lax.scan(one, (x, optimizer.init(x)), grads)[1])(array(z[f'adam/{seed}/grads']))
    close(found, z[f'adam/{seed}/{name}_eps1e-5_lr1e-2'], 1e-6 if name == 'tf' else exact)
