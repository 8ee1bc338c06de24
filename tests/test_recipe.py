"The recipe of the first paper on language models from preferences: what it does in a world where everything is known."
import dataclasses, functools
import numpy as np, pytest
import optax
from flax import nnx
from rlhf_lab.ppo import ActorCritic, PPOConfig, practise
from rlhf_lab.practise import openai_2019
from rlhf_lab.train import adamw, init_state, tf_adam
from rlhf_lab.world import World

@functools.cache
def practised(seed, adam, rate=2e-2, steps=150, target=1.):
    "Distance and price in each rollout: the recipe, but for what its size and its texts need."
    world = World(seed=seed)
    config = dataclasses.replace(openai_2019(PPOConfig(batch_size=256, kl_target=target, kl_horizon=1_000, adam=adam, precision='float32', seed=seed)),
        temperature=1., judged_until='', missing_eos_replaces=False, missing_eos_penalty=0.)
    optimizer = adamw(rate, 4*steps, max_grad_norm=config.max_grad_norm, eps=config.adam_eps, rule=tf_adam if config.adam == 'tf' else optax.adamw)
    state = init_state(ActorCritic(world.reference), optimizer, wrt=nnx.Param)
    rollouts = practise(state, world.reference, [[0]]*256, world.reward, optimizer, config, write=world.write)
    return np.array([[m['objective/kl'], m['lab/kl_coef']] for _, (_, m, _) in zip(range(steps), rollouts)]).T

@pytest.mark.parametrize('seed', [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_the_distance_locks_onto_its_target(seed):
    "Within a tenth, in three worlds; the price has found its own way there."
    kl, price = practised(seed, 'auto')
    assert kl[0] < .05 and abs(kl[-40:].mean() - 1) < .1
    assert np.ptp(price) > .1*price[0]

@pytest.mark.slow
def test_the_first_steps_of_tensorflows_adam_are_gentler():
    "Their difference is gone when the distance is locked."
    tf, torch = (practised(0, adam)[0] for adam in ('tf', 'torch'))
    assert tf[1] < .9*torch[1]
    assert abs(tf[-40:].mean() - torch[-40:].mean()) < .1
