"Reward losses and their gradients are those of TRL and of OpenAI's first reward model; their optima are those of choix."
import functools, math
import jax, jax.numpy as jnp, numpy as np, pytest
from goldens import Saying, array, close, double, each, exact, in_float64, load, sides
from rlhf_lab.choices import best_of_k, bradley_terry, ordinal, plackett_luce, rao_kupper, top_only
from rlhf_lab.core import Batch
from rlhf_lab.judges import Lists, list_loss
from rlhf_lab.reward import last_token, reward_loss

@pytest.mark.skipif(double, reason='this is the float64 run')
@pytest.mark.slow
def test_all_of_this_in_float64(): in_float64(__file__)

def judge_saying(rewards):
    "A judge that gives each row the reward it is told to."
    return Saying(jnp.tile(jnp.ravel(rewards)[:, None, None], (1, 3, 1)), head=lambda pooled: pooled[:, 0])

def rows(n): return np.zeros((n, 3)), [[0, 1, 1]]*n

# ── pairs ──

@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jax.value_and_grad, has_aux=True)
def pair_loss(rewards, margin, centre):
    total, *rest = reward_loss(judge_saying(rewards), sides(*rows(len(rewards)), margin=margin), last_token, centre=centre)
    return total, rest

@each('reward_model')
@pytest.mark.parametrize('name, with_margin, centre', [('plain', 0, 0.), ('margin', 1, 0.), ('center0.01', 0, .01), ('margin_center0.1', 1, .1)])
def test_bradley_terry(seed, name, with_margin, centre):
    z = load('reward_model')
    rewards, margin = array(z[f'{seed}/rewards']), with_margin*array(z[f'{seed}/margin'])
    (total, (weight, seen)), grad = pair_loss(rewards, margin, centre)
    close(total/weight, z[f'{seed}/{name}/loss'])
    close(seen['accuracy'][0]/weight, z[f'{seed}/{name}/accuracy'], 1e-6)
    close(seen['margin'][0]/weight, z[f'{seed}/{name}/mean_margin'])
    close(grad/weight, z[f'{seed}/{name}/grad_rewards'])

def test_equal_rewards_cost_ln_2_and_a_margin_its_own_share():
    close(bradley_terry(array(0.)), np.log(2))
    close(bradley_terry(array(-1.)), -np.log(1/(1 + np.e)))

@jax.jit
@functools.partial(jax.grad, argnums=2)
def slope_of_pairs(won, lost, worth, pull): return bradley_terry(worth[won] - worth[lost]).sum() + pull*(worth**2).sum()

@each('preference_stats', 'bt')
@pytest.mark.parametrize('pull', [0., .1])
def test_the_likeliest_worth_of_things_that_were_compared(seed, pull):
    "At the stored maximum our loss is flat; choix adds pull·|worth|², without a half."
    z = load('preference_stats')
    worth = array(z[f'bt/{seed}/choix_alpha{pull}'])
    slope = lambda worth, pull: np.abs(slope_of_pairs(*z[f'bt/{seed}/winner_loser'].T, worth, pull)).max()
    assert slope(worth, pull) < (1e-4 if double else 1e-3)
    assert slope(1.05*worth, pull) > .1 and slope(worth, pull + .05) > .05

# ── lists ──

def winner(rewards, ranks): return plackett_luce(rewards, top_only(ranks))

@functools.partial(jax.jit, static_argnames='loss')
@functools.partial(jax.value_and_grad, has_aux=True)
def lists_loss(rewards, ranks, loss=plackett_luce):
    total, *rest = list_loss(judge_saying(rewards), Lists(Batch(*map(jnp.asarray, rows(rewards.size))), ranks), loss=loss)
    return total, rest

@each('ppo_openai_tf', 'best_of_4')
def test_best_of_four(seed):
    z = load('ppo_openai_tf')
    rewards, best = array(z[f'best_of_4/{seed}/rewards']), z[f'best_of_4/{seed}/best']
    close(best_of_k(rewards, best).mean(), z[f'best_of_4/{seed}/loss'])
    (total, (weight, _)), grad = lists_loss(rewards, 1. + (np.arange(4) != best[:, None]), loss=winner)
    close(total/weight, z[f'best_of_4/{seed}/loss'])
    chances = np.exp(rewards)/np.exp(rewards).sum(1, keepdims=True)
    close(grad, chances - np.eye(4)[best])

@each('preference_stats', 'pl')
def test_the_likeliest_worth_of_things_that_were_ranked(seed):
    "Rankings of two to seven; through `list_loss`, with the answers in any order."
    z = load('preference_stats')
    said, worth = z[f'pl/{seed}/rankings_best_first_pad-1'], array(z[f'pl/{seed}/choix_params'])
    shuffled = np.random.default_rng(0).permuted(np.tile(np.arange(said.shape[1]), (len(said), 1)), axis=1)
    said, ranks = (np.take_along_axis(x, shuffled, 1) for x in (said, np.where(said < 0, np.nan, 1. + np.arange(said.shape[1]))))
    (total, (weight, seen)), grad = lists_loss(worth[said], array(ranks))
    close(total, z[f'pl/{seed}/nll_at_params'])
    assert weight == len(said) and seen['alone'][0] == 0 and (np.asarray(grad)[said < 0] == 0).all()
    slope = np.bincount(said[said >= 0], np.asarray(grad, float)[said >= 0])
    assert np.abs(slope).max() < 1e-4*(1 if double else 10)

@pytest.mark.parametrize('k', [1, 4])
def test_equal_rewards_cost_ln_k_for_the_best_and_ln_k_factorial_for_the_order(k):
    same, ranks = array(np.full(k, .3)), array(1. + np.arange(k))
    close(best_of_k(same, k - 1), math.log(k))
    close(plackett_luce(same, ranks), math.log(math.factorial(k)))

def test_no_list_makes_a_number_that_is_none():
    "Whatever is missing, loss and gradient are finite, and 0 where nothing was said."
    marks = array([[1, 2, 3], [1, np.nan, np.nan], [np.nan]*3, [1, np.inf, np.nan], [np.inf]*3, [2, 2, np.nan]])
    rewards = array(np.random.default_rng(0).normal(size=marks.shape)*100)
    (total, (weight, _)), grad = lists_loss(rewards, marks)
    assert np.isfinite(total) and np.isfinite(grad).all() and weight == 3
    assert (np.asarray(grad)[[1, 2, 4]] == 0).all() and (np.asarray(grad)[[0, 3, 5]] != 0).any(1).all()

# ── ties and levels, by the formulas of the papers ──

@pytest.mark.parametrize('step', [.1, 1., 3.])
def test_ties_have_the_probabilities_of_rao_and_kupper(step):
    a, b, nu = array(np.exp([.3, -2., 1.])), array(np.exp([.1, 1.5, 1.])), np.exp(step)
    tie, won = a*b*(nu**2 - 1)/((a + nu*b)*(b + nu*a)), a/(a + nu*b)
    for chance, expected in ((.5, tie), (1., won), (0., b/(b + nu*a)), (.8, won**.8*(b/(b + nu*a))**.2)):
        close(rao_kupper(jnp.log(a/b), chance, step), -np.log(expected), 10*exact)

def test_levels_have_the_probabilities_of_proportional_odds():
    steps, reward = np.array([-1., .5, 2.]), np.linspace(-3, 3, 7)[:, None]
    below = np.pad(1/(1 + np.exp(reward - steps)), ((0, 0), (1, 1)), constant_values=(0, 1))
    close(ordinal(array(reward), np.arange(4), array(steps)), -np.log(np.diff(below)), 10*exact)
