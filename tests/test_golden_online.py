"Advantages, losses and gradients of RLOO, GRPO and its relatives are those of TRL; estimates of KL are those of tunix."
import functools
import jax, jax.numpy as jnp, numpy as np, pytest
from goldens import array, close, double, each, exact, in_float64, load, rough
from rlhf_lab.core import Rollout
from rlhf_lab.online import (bnpo, cispo, dapo, dr_grpo, grpo, grpo_advantages, grpo_loss, k1, k2, k3, rloo_advantages, rloo_loss, sequencewise)
from rlhf_lab.ppo import clipped_surrogate

@pytest.mark.skipif(double, reason='this is the float64 run')
@pytest.mark.slow
def test_all_of_this_in_float64(): in_float64(__file__)

@each('grpo_rloo', 'adv')
def test_advantages(seed):
    "Of two reward functions, weighed; one completion may have no score of one of them."
    z = {key: array(load('grpo_rloo')[f'adv/{seed}/{key}']) for key in ('rewards_per_func', 'reward_weights', 'grpo_scale_group', 'grpo_scale_none', 'rloo_norm0')}
    scores = np.nansum(z['rewards_per_func']*z['reward_weights'], axis=1)
    scores[np.isnan(z['rewards_per_func']).all(1)] = np.nan
    close(grpo_advantages(jnp.asarray(scores), 4), z['grpo_scale_group'], rough)
    close(grpo_advantages(jnp.asarray(scores), 4, scale=False), z['grpo_scale_none'])
    close(rloo_advantages(jnp.asarray(scores), 4), z['rloo_norm0'])

def sapo(logprobs, old, A):
    "A surrogate that the library does not have: a soft gate in the place of the clip."
    heat = jnp.where(A > 0, 1., 1.05)
    return -A*4/heat*jax.nn.sigmoid(heat*(jnp.exp(logprobs - old) - 1))
def luspo(losses, mask): return (losses*mask).sum(), len(losses)

clip = lambda **how: functools.partial(clipped_surrogate, **how)
CONFIGS = {'grpo_b0': dict(aggregate=grpo), 'grpo_b0.04': dict(aggregate=grpo, kl_coef=.04), 'bnpo_b0': dict(aggregate=bnpo),
    'dr_grpo_b0': dict(aggregate=functools.partial(dr_grpo, longest=10)), 'dr_grpo_b0.04': dict(aggregate=functools.partial(dr_grpo, longest=10), kl_coef=.04),
    'dapo_hi0.28': dict(aggregate=dapo, surrogate=clip(clip_high=.28)), 'gspo': dict(aggregate=grpo, level=sequencewise, surrogate=clip(clip=3e-4, clip_high=4e-4)),
    'cispo_eh5': dict(aggregate=dapo, surrogate=functools.partial(cispo, most=5.)), 'grpo_delta1.5': dict(aggregate=grpo, surrogate=clip(most=1.5)),
    'sapo': dict(aggregate=grpo, surrogate=sapo), 'luspo': dict(aggregate=luspo, level=sequencewise)}

LOSSES = {name: functools.partial(grpo_loss, **how) for name, how in CONFIGS.items()} | {'rloo': rloo_loss}

@jax.jit
def all_of(logprobs, rollout):
    "Every loss with its measurements and gradient, compiled once."
    def mean(logprobs, loss):
        total, weight, seen = loss(logprobs, rollout)
        return total/weight, {name: a/b for name, (a, b) in seen.items()}
    return {name: jax.value_and_grad(mean, has_aux=True)(logprobs, loss) for name, loss in LOSSES.items()}

@functools.cache
def found(seed):
    "Padded to the same length for all seeds."
    z = load('grpo_rloo')
    wide = lambda x: np.pad(x, ((0, 0), (0, 10 - x.shape[1])))
    new, old, ref, mask = (wide(array(z[f'{seed}/{key}'])) for key in ('new_per_token_logps', 'old_per_token_logps', 'ref_per_token_logps', 'completion_mask'))
    advantages = np.where(mask > 0, array(z[f'{seed}/advantages'])[:, None], 0)
    return mask > 0, all_of(new, Rollout(np.zeros(mask.shape, 'int32'), mask > 0, logprobs=old, ref_logprobs=ref, advantages=advantages))

@each('grpo_rloo')
@pytest.mark.parametrize('name', LOSSES)
def test_losses(seed, name):
    "And their gradients, none of which comes from padding."
    z, (mask, every) = load('grpo_rloo'), found(seed)
    (loss, seen), grad = every[name]
    tolerance, expected = rough if name == 'sapo' else exact, z[f'{seed}/{name}/grad_new_per_token_logps']
    close(loss, z[f'{seed}/{name}/loss'], tolerance)
    close(grad[:, :expected.shape[1]], expected, tolerance)
    assert (np.asarray(grad)[~mask] == 0).all()
    if f'{seed}/{name}/metric_kl' in z: close(seen['loss/kl_avg'], z[f'{seed}/{name}/metric_kl'])
    if f'{seed}/{name}/metric_clip_low_mean' in z:
        close(seen['policy/clipfrac_avg'], z[f'{seed}/{name}/metric_clip_low_mean'] + z[f'{seed}/{name}/metric_clip_high_mean'], 1e-6)

@each('rl_control_and_peers', 'gae_peers')
def test_estimates_of_kl(seed):
    z = load('rl_control_and_peers')
    d, mask = (array(z[f'gae_peers/{seed}/{a}']) for a in ('logp', 'mask'))
    d = d - array(z[f'gae_peers/{seed}/ref_logp'])
    for kl, name in ((k1, 'kl'), (k2, 'mse_kl'), (k3, 'low_var_kl')): close(kl(d), z[f'gae_peers/{seed}/tunix_{name}'], 1e-5)
