"What takes a training to show: replayed rollouts, lessons that are a trainer's, KL against enumeration, and how long a visitor waits."
import time
import jax, jax.numpy as jnp, numpy as np, pytest
from flax import nnx
from rlhf_lab.core import LabError, Pairs
from rlhf_lab.data import Example, collate
from rlhf_lab.dpo import Thumbs, dpo_loss, kto_loss, reference_logprobs
from rlhf_lab.lora import add_head, add_lora, drop_lora
from rlhf_lab.model import ModelConfig, Transformer, score_tokens
from rlhf_lab.ppo import ActorCritic, PPOConfig, practise
from rlhf_lab.tokens import encode_prompt
from rlhf_lab.train import adamw, init_state, make_step
from rlhf_lab.weights import load_model
from rlhf_lab.world import Table, World
from rlhf_lab.xray import Sandbox, lesson, replay

config = ModelConfig(50, 16, 2, 2, 1, 8, 32, max_length=128)
base = Transformer(config, key=jax.random.key(0))
prompt, answer, better = [5, 6, 7], [20, 21, 22], [23, 24, 25, 26]

def row(*said):
    rows = [[Example(np.array(start + text, np.int32), np.arange(len(start + text)) >= len(start))] for start, text in said]
    return collate(rows, 16)

def test_the_mean_log_ratio_of_samples_is_the_kl_of_all_that_can_be_said():
    world = World()
    tilted = Table(world.words, world.length, std=1., key=jax.random.key(3))
    p = world.logprobs(tilted)
    exact = float((jnp.exp(p)*(p - world.ref)).sum())
    drawn = world.write(tilted, [[0]]*4000, key=jax.random.key(0))
    ratios = drawn.logprobs.sum(1) - world.ref[world.number(drawn.tokens)]
    assert exact > .5 and abs(ratios.mean() - exact) < 4*ratios.std()/4000**.5

@pytest.mark.slow
@pytest.mark.parametrize('group', [1, 2])
def test_a_rollout_is_replayed_from_seed_and_step(group):
    room = add_lora(base, key=jax.random.key(1), rank=4, top=1)
    how = PPOConfig(batch_size=4, minibatches=1, max_new_tokens=4, precision='float32', seed=5)
    prompts, optimizer = [[i, i + 1] for i in range(8)], adamw(1e-1)
    state = init_state(ActorCritic(add_head(room, std=0., key=jax.random.key(0))), optimizer, jax.random.key(5))
    kept = lambda state: jax.tree.map(jnp.array, nnx.split(state.model.policy)[1]) # a copy: an update takes the arrays that it is given
    graph, written, policies = nnx.split(state.model.policy)[0], [], [kept(state)]
    reward = lambda rollout: np.where(rollout.mask, rollout.tokens, 0).sum(1)/50.
    for (state, _, rollout), _ in zip(practise(state, drop_lora(room), prompts, reward, optimizer, how, group=group), range(3)):
        written.append(rollout)
        policies.append(kept(state))
    for step in range(3):
        again = replay(nnx.merge(graph, policies[step]), prompts, how, step, group=group)
        assert (again.tokens == written[step].tokens).all() and (again.mask == written[step].mask).all()
    wrong = replay(nnx.merge(graph, policies[0]), prompts, how, 2, group=group)
    assert (wrong.tokens != written[2].tokens).any() # the weights matter

@pytest.mark.slow
def test_a_step_in_the_sandbox_is_a_step_of_the_trainer():
    sandbox = Sandbox(base, [[8, 9], [10, 11, 12]], key=jax.random.key(9), rank=4, top=1, max_new_tokens=4, learning_rate=1e-2)
    start = sandbox.states[0]
    fresh = lambda: start.replace(**{name: jax.tree.map(jnp.array, getattr(start, name)) for name in ('params', 'opt_state')})
    said = sandbox.teach(prompt, answer, better=better, steps=1)
    change = (said['after']['logprobs'] - said['before']['logprobs']).sum(1)
    assert change[1] > change[0]
    pair = reference_logprobs(base, Pairs(row((prompt, better)), row((prompt, answer))))
    trained, measured = make_step(dpo_loss, adamw(1e-2))(fresh(), pair)
    assert abs(float(measured['loss']) - said['loss'][0]) < 1e-5
    for ours, theirs in zip(*map(jax.tree.leaves, (sandbox.states[-1].params, trained.params))): assert np.abs(ours - theirs).max() < 1e-4
    sandbox.undo()
    said = sandbox.teach(prompt, answer, liked=True, steps=1)
    others = row(([8, 9], answer), ([10, 11, 12], answer))
    batch, ref = row((prompt, answer)), lambda rows: score_tokens(base, rows)[0].sum(1)
    thumbs = Thumbs(batch, jnp.array([True]), ref(batch), others, ref(others))
    trained, measured = make_step(kto_loss, adamw(1e-2))(fresh(), thumbs)
    assert abs(float(measured['loss']) - said['loss'][0]) < 1e-5
    for ours, theirs in zip(*map(jax.tree.leaves, (sandbox.states[-1].params, trained.params))): assert np.abs(ours - theirs).max() < 1e-4
    sandbox.undo()
    sandbox.undo() # one too many changes nothing
    for ours, theirs in zip(*map(jax.tree.leaves, (sandbox.states[-1].params, start.params))): assert (ours == theirs).all()

def test_an_empty_answer_teaches_nothing_and_says_so():
    with pytest.raises(LabError, match='empty answer'): lesson(base, prompt, [])
    with pytest.raises(LabError, match='empty answer'): lesson(base, prompt, answer, better=[])

@pytest.mark.slow
@pytest.mark.parametrize('name, limit', [('toy', 2), ('smollm2', 20)])
def test_a_visitor_does_not_wait_long_for_a_lesson(name, limit, toy):
    "Warm: the first lesson of a process compiles. We count the processor's seconds, which a busy machine does not stretch: on free cores nobody waits longer."
    try: model, tokenizer = load_model(toy) if name == 'toy' else load_model()
    except LabError as error: pytest.skip(f'the weights cannot be had: {error}')
    ask = lambda text: encode_prompt(tokenizer, [dict(role='user', content=text)])
    probes = [ask(text) for text in ('What is a film?', 'Say hello.', 'Why do people vote?', 'Name a colour.', 'Tell me about music.')]
    took = {}
    for how in (dict(liked=False), dict(better=tokenizer.encode(' It was a joy to watch.'))):
        for visitor in range(2):
            sandbox = Sandbox(model, probes, key=jax.random.key(visitor), stop=(tokenizer.eos_token_id,))
            start = time.process_time()
            said = sandbox.teach(ask('How was the film?'), tokenizer.encode(' I left early, and so should you.'), **how)
            took[*how, visitor] = time.process_time() - start
        assert said['loss'][-1] < said['loss'][0] and np.abs(said['before']['kl']).max() < 1e-3
    print(name, {key: round(seconds, 2) for key, seconds in took.items()})
    assert max(seconds for (*_, visitor), seconds in took.items() if visitor) < limit

def test_the_critic_of_a_run_is_found_again_and_a_missing_one_is_named(tmp_path, toy):
    import json
    from rlhf_lab.inside import earned, open_critic
    from rlhf_lab.lora import save_adapter
    from rlhf_lab.practise import load_actor
    from rlhf_lab.runs import as_dict
    config = PPOConfig(model='gone since', rank=2, alpha=4., top_layers=1, precision='float32')
    actor, _ = load_actor(PPOConfig(**{**as_dict(config), 'model': toy}), jax.random.key(3))
    actor.policy.head.weight[...] = jnp.arange(16.).reshape(actor.policy.head.weight.shape)
    (tmp_path/'config.json').write_text(json.dumps(as_dict(config)))
    with pytest.raises(LabError, match='adapter.safetensors'): open_critic(tmp_path, toy)
    save_adapter(actor.policy, tmp_path/'adapter.safetensors')
    again, settings = open_critic(tmp_path, toy)
    seen, _ = earned(again, settings, 1., prompt, answer)
    assert (again.policy.head.weight[...] == actor.policy.head.weight[...]).all() and np.abs(seen['value']).max() > 0
    (tmp_path/'config.json').write_text(json.dumps(dict(as_dict(config), separate_critic=True)))
    with pytest.raises(LabError, match='not kept'): open_critic(tmp_path, toy)
