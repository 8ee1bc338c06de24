"Advantages over several episodes, the clipped losses and normal policies are those of CleanRL, HALOs, tunix and torch."
import functools, re
from typing import NamedTuple
import jax, numpy as np, pytest
from goldens import double, exact, golden, in_float64, kind
from rlhf_lab.control import Categorical, Diagonal, Full, Transition, control_loss, full, tanh_correction
from rlhf_lab.core import whiten
from rlhf_lab.ppo import gae

@functools.cache
def load():
    "Everything, in the precision of this run."
    return {k: np.asarray(x, kind if x.dtype.kind == 'f' else None) for k, x in np.load(golden/'rl_control_and_peers.npz').items()}

def each(subject):
    "A test for each seed of a subject, and what is known about it."
    seeds = sorted({m[0] for k in load() if (m := re.match(rf'{subject}/s\d+/', k))})
    assert seeds
    return pytest.mark.parametrize('z', [{k.removeprefix(s): x for k, x in load().items() if k.startswith(s)} for s in seeds], ids=seeds)

def close(found, expected, tolerance=exact):
    assert np.shape(found) == np.shape(expected)
    assert np.abs(np.asarray(found) - expected).max() <= tolerance*max(1, np.abs(expected).max())

@pytest.mark.skipif(double, reason='this is the float64 run')
@pytest.mark.slow
def test_all_of_this_in_float64(): in_float64(__file__)

# ── advantages ──

compiled_gae, compiled_whiten = jax.jit(gae), jax.jit(whiten, static_argnames='ddof')

@each('cleanrl')
def test_advantages_over_the_ends_of_episodes(z):
    "CleanRL says with each observation whether an episode ended before it; we, as PureJaxRL, whether it ended after the action."
    done = np.concatenate([z['dones'][1:], z['next_done'][None]]).astype(bool)
    assert 0 < done.sum() < done.size
    ones = np.ones(done.T.shape, bool)
    advantages, returns = compiled_gae(z['rewards'].T, z['values'].T, ones, .99, .95, done.T, z['next_value'])
    close(advantages.T, z['advantages'])
    close(returns.T, z['returns'])
    early = compiled_gae(z['rewards'].T, z['values'].T, ones, .99, .95, z['dones'].astype(bool).T, z['next_value'])[0] # the classic mistake
    assert np.abs(early.T - z['advantages']).max() > .1

@each('gae_peers')
def test_advantages_over_holes(z):
    "The peers whiten: tunix with n − 1 and a few float32 constants, HALOs with n."
    for mask, adv, returns, ddof in (('mask', 'tunix_mask_adv', 'tunix_mask_returns', 1), ('mask_with_interior_hole', 'tunix_hole_adv', 'tunix_hole_returns', 1),
                                     ('mask', 'halos_adv_norm', 'halos_returns', 0)):
        real = z[mask].astype(bool)
        assert not real.all()
        advantages, found = map(np.asarray, compiled_gae(z['rewards'], z['values'], real, .99, .95))
        close(found[real], z[returns][real])
        close(np.asarray(compiled_whiten(advantages, real, ddof=ddof))[real], z[adv][real], max(exact, 1e-8))
        assert not found[~real].any() and not advantages[~real].any()

# ── the loss ──

class Given(NamedTuple):
    "A policy and a critic that say what they are told."
    logprobs: object
    entropies: object
    guesses: object
    def __call__(self, obs): return self
    def logprob(self, action): return self.logprobs
    def entropy(self): return self.entropies
    def values(self, obs): return self.guesses

@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def ask(agent, steps):
    total, count, measured = control_loss(agent, steps)
    return total/count, {name: a/b for name, (a, b) in measured.items()}

@each('cleanrl')
def test_control_loss(z):
    adv = z['advantages'].reshape(-1)
    steps = Transition(*[None]*7, logprob=z['old_logprob'], value=z['values'].reshape(-1), returns=z['returns'].reshape(-1),
        advantage=(adv - adv.mean())/(adv.std(ddof=1) + kindly(1e-8)))
    (loss, measured), slope = ask(Given(z['new_logprob'], z['entropy'], z['new_value']), steps)
    close(loss, z['loss'])
    close(slope.logprobs, z['grad_new_logprob'])
    close(slope.guesses, z['grad_new_value'])
    for name, key, tolerance in (('loss/policy_avg', 'pg_loss', exact), ('loss/value_avg', 'v_loss', exact), ('policy/approxkl_avg', 'approx_kl', exact),
                                 ('policy/clipfrac_avg', 'clipfrac', max(exact, 1e-6))):
        close(measured[name], z[key], tolerance)
    assert measured['policy/clipfrac_avg'] > 0
    close(compiled_whiten(adv, np.ones(adv.shape, bool), ddof=1), steps.advantage, 1e-6) # its 1e-8 is beside the variance, not the deviation

def kindly(x): return np.asarray(x, kind)

# ── normal policies ──

@jax.jit
def describe(one, two, x): return one.logprob(x), one.entropy(), one.kl(two)

@each('gauss')
def test_diagonal(z):
    logprob, entropy, kl = describe(Diagonal(z['mean'], z['log_std']), Diagonal(z['mean2'], z['log_std2']), z['x'])
    close(logprob, z['diag_logp'])
    close(entropy, np.broadcast_to(z['diag_entropy'], len(z['x'])))
    close(kl, z['diag_kl_1_2'])
    close(logprob - jax.jit(tanh_correction)(z['x']), z['tanh_diag_logp'])

@each('gauss')
def test_full(z):
    logprob, entropy, kl = describe(Full(z['mean'], z['scale_tril']), Full(z['mean2'], kindly(1.1)*z['scale_tril']), z['x'])
    close(logprob, z['mvn_logp'])
    close(entropy, np.broadcast_to(z['mvn_entropy'], len(z['x'])))
    close(kl, z['mvn_kl_to_scaled_1p1'])
    raw = np.tril(z['scale_tril'], -1) + np.diag(np.log(np.diag(z['scale_tril']))) + np.triu(np.ones((3, 3), kind), 1) # above the diagonal: ignored
    close(jax.jit(full)(z['mean'], raw).scale_tril, z['scale_tril'])

@each('gauss')
def test_categorical_is_a_softmax(z):
    "In numbers that torch would give: here against the definition, in float64."
    logits, other, action = z['x'], z['mean2'], np.arange(len(z['x'])) % 3
    p, q = (np.exp(np.float64(x))/np.exp(np.float64(x)).sum(-1, keepdims=True) for x in (logits, other))
    logprob, entropy, kl = describe(Categorical(logits), Categorical(other), action)
    close(logprob, np.log(p[np.arange(len(p)), action]))
    close(entropy, -(p*np.log(p)).sum(-1))
    close(kl, (p*np.log(p/q)).sum(-1))
