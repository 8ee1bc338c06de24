"The players of 39_control: what they see, when an episode is over, and that they learn (slow)."
import sys
import jax, jax.numpy as jnp, numpy as np, pytest
from rlhf_lab.control import ControlConfig, control_report, full, hands, learner, load_environment
from rlhf_lab.core import UsageError

def test_without_gymnax_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gymnax', None)
    with pytest.raises(UsageError, match='pip install gymnax') as said: load_environment('CartPole-v1')
    assert '\n' not in str(said.value)

def test_the_pole_obeys_the_equations():
    "Barto, Sutton and Anderson 1983, one Euler step of 0.02 s, in float64."
    pole = load_environment('CartPole-v1')
    state = pole.reset(jax.random.key(0))[1].replace(x=.1, x_dot=.5, theta=.05, theta_dot=-.7)
    obs, _, reward, fell, cut = pole.step(jax.random.key(1), state, jnp.array(1))
    force, mass, pole_mass, half, sin, cos = 10, 1.1, .1, .5, np.sin(.05), np.cos(.05)
    push = (force + pole_mass*half*.49*sin)/mass
    turn = (9.8*sin - cos*push)/(half*(4/3 - pole_mass*cos**2/mass))
    np.testing.assert_allclose(obs, [.1 + .02*.5, .5 + .02*(push - pole_mass*half*turn*cos/mass), .05 - .02*.7, -.7 + .02*turn], rtol=1e-5)
    assert (reward, fell, cut) == (1, False, False)

@pytest.mark.parametrize('name, limit', [('CartPole-v1', 500), ('Pendulum-v1', 200)])
def test_the_clock_is_no_fall(name, limit):
    task = load_environment(name)
    action = jnp.array(0) if task.outputs == 2 else jnp.zeros(1)
    def end(time, **changes):
        state = task.reset(jax.random.key(0))[1].replace(time=time, **changes)
        return [bool(x) for x in task.step(jax.random.key(1), state, action)[3:]]
    assert end(limit - 1) == [False, True] and end(limit - 2) == [False, False]
    if name == 'CartPole-v1': assert end(7, x=2.5) == [True, False]

def test_a_training_is_a_function_of_its_key():
    "And several at once are the same trainings, to float32; the learning rate ends at 0."
    config = ControlConfig('Pendulum-v1', steps=128, environments=4, length=16, epochs=2, minibatches=2)
    learn, keys = learner(config, full, hands(load_environment('Pendulum-v1'), 2)), jax.random.split(jax.random.key(0), 2)
    alone, again, both = (f := jax.jit(learn))(keys[0]), f(keys[0]), jax.jit(jax.vmap(learn))(keys)
    for a, b in zip(jax.tree.leaves((alone[0].params, alone[1])), jax.tree.leaves((again[0].params, again[1]))): np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(alone[0].params), jax.tree.leaves(both[0].params)):
        np.testing.assert_allclose(a, b[0], atol=1e-3)
        assert a.ndim < 2 or (b[0] != b[1]).any() # biases start alike, weights do not
    state, measured = both
    assert (state.step == 2*2*2).all() and all(x.shape[:2] == (2, 2) for x in measured.values()) and measured['taken'].all()
    assert (np.diff(np.asarray(state.opt_state[1].hyperparams['learning_rate'])) == 0).all()

# ── slow: the proof ──

@pytest.mark.slow
def test_everybody_learns(tmp_path):
    best = control_report(tmp_path)
    assert sum(b >= 475 for b in best['CartPole']) >= 2
    assert all(b > -300 for name in best if 'Pendulum' in name for b in best[name])
    assert 0 < (tmp_path/'curves.png').stat().st_size < 60_000
