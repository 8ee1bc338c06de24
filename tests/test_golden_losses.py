"Losses, adapters and whole trainings are those of TRL, HALOs, peft and of the papers' own code."
import functools
import jax, jax.numpy as jnp, numpy as np, optax, pytest
from flax import nnx
from goldens import Saying, array, ask, close, compile_quickly, double, each, exact, in_float64, kind, load, sides, tiny
from rlhf_lab.dpo import cdpo, dpo_loss, reference_logprobs
from rlhf_lab.lora import LoRA
from rlhf_lab.model import Linear
from rlhf_lab.reward import bradley_terry, last_token, reward_loss
from rlhf_lab.train import fit, init_state, make_step

@pytest.mark.skipif(double, reason='this is the float64 run')
def test_all_of_this_in_float64(): in_float64(__file__)

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

# ── rewards ──

@each('reward_model')
@pytest.mark.parametrize('name, with_margin, centre', [('plain', 0, 0.), ('margin', 1, 0.), ('center0.01', 0, .01), ('margin_center0.1', 1, .1)])
def test_bradley_terry(seed, name, with_margin, centre):
    z = load('reward_model')
    rewards, margin = array(z[f'{seed}/rewards']), with_margin*array(z[f'{seed}/margin'])
    tokens = np.zeros((len(rewards), 3))
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(rewards):
        states = jnp.tile(rewards[:, None, None], (1, 3, 1))
        model = Saying(states, head=lambda pooled: pooled[:, 0])
        total, *rest = reward_loss(model, sides(tokens, [[0, 1, 1]]*len(tokens)), last_token, distance=margin, centre=centre)
        return total, rest
    (total, (weight, seen)), grad = loss(rewards)
    close(total/weight, z[f'{seed}/{name}/loss'])
    close(seen['accuracy'][0]/weight, z[f'{seed}/{name}/accuracy'], 1e-6)
    close(seen['margin'][0]/weight, z[f'{seed}/{name}/mean_margin'])
    close(grad/weight, z[f'{seed}/{name}/grad_rewards'])

def test_equal_rewards_cost_ln_2_and_a_margin_its_own_share():
    close(bradley_terry(array(0.)), np.log(2))
    close(bradley_terry(array(-1.)), -np.log(1/(1 + np.e)))

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
