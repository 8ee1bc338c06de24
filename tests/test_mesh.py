"One program on one device and on eight: the same losses, the same gradients, the same words."
import json, os, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
SHAPES = 'data=8', 'data=4,fsdp=2', 'fsdp=8', 'data=2,tensor=4', 'data=2,fsdp=2,tensor=2'

def child(code: str, devices: int = 8, timeout: int = 900, **env) -> str:
    "What a process with so many simulated devices prints."
    start = f"import jax\njax.config.update('jax_num_cpu_devices', {devices})\n"
    done = subprocess.run([sys.executable, '-c', start + code], capture_output=True, text=True, cwd=root, timeout=timeout, env=os.environ | env)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout

EQUAL = '''
import json, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from rlhf_lab.core import Batch, Pairs, Rollout
from rlhf_lab.dpo import dpo_loss
from rlhf_lab.generate import generate
from rlhf_lab.lora import add_head
from rlhf_lab.mesh import mesh_of, on_mesh, under
from rlhf_lab.model import ModelConfig, Transformer
from rlhf_lab.ppo import ActorCritic, ppo_loss
from rlhf_lab.reward import reward_loss
from rlhf_lab.sft import sft_loss
from rlhf_lab.train import init_state, make_step

base = add_head(Transformer(ModelConfig(48, 16, 1, 4, 2, 8, 32, max_length=64), key=jax.random.key(0)), key=jax.random.key(1))
rng, sgd, found = np.random.default_rng(0), optax.sgd(1.), {}
rows = lambda: Batch(rng.integers(1, 48, (8, 12)).astype(np.int32), (np.arange(12) > 3) & (np.arange(12) < rng.integers(6, 12, (8, 1))))
f = lambda *s: rng.normal(size=s).astype(np.float32)
chosen, rejected = rows(), rows()
rejected.tokens[:, :4] = chosen.tokens[:, :4] # the prompt, which is read once
pairs = Pairs(chosen, rejected, ref_chosen=f(8), ref_rejected=f(8), alike=4)
rollout = Rollout(**vars(rows()) | dict(logprobs=f(8, 12) - 4, values=f(8, 12), advantages=f(8, 12), returns=f(8, 12)))
tasks = dict(sft=(sft_loss, base, rows()), reward=(reward_loss, base, pairs), ppo=(ppo_loss, ActorCritic(base), rollout), dpo=(dpo_loss, base, pairs))

def slope(loss, model, data, mesh, accumulate):
    before = init_state(on_mesh(model, mesh), sgd, wrt=nnx.Param)
    start = jax.tree.map(np.array, before.params)
    after, measured = make_step(loss, sgd, accumulate)(before, data)
    if mesh: assert under(after.params).size == mesh.size and len({s.device for s in jax.tree.leaves(after.params)[0].addressable_shards}) == mesh.size
    return float(measured['loss']), [a - np.asarray(b) for a, b in zip(*map(jax.tree.leaves, (start, after.params)))]

def said(mesh):
    rollout = generate(on_mesh(base, mesh), [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]*2, key=jax.random.key(3), n=2, max_new_tokens=6, stop=(5,))
    return np.asarray(rollout.tokens), np.asarray(rollout.logprobs)

for name in NAMES:
    loss, model, data = tasks[name]
    value, grads = slope(loss, model, data, None, ACCUMULATE)
    assert max(np.abs(g).max() for g in grads) > 1e-3
    for text in SHAPES:
        other, others = slope(loss, model, data, mesh_of(text, 8), ACCUMULATE)
        found[f'{name} {text}'] = max(abs(value - other), *(float(np.abs(a - b).max()) for a, b in zip(grads, others)))
words, logprobs = said(None)
for text in SHAPES:
    others, other = said(mesh_of(text, 8))
    assert (words == others).all(), text
    found[f'generate {text}'] = float(np.abs(logprobs - other).max())
print(json.dumps(found))
'''

def equal(names, shapes, accumulate=1):
    found = json.loads(child(f'NAMES, SHAPES, ACCUMULATE = {tuple(names)}, {tuple(shapes)}, {accumulate}\n{EQUAL}').splitlines()[-1])
    assert len(found) == (len(names) + 1)*len(shapes) and max(found.values()) < 1e-5, found

def test_a_mesh_changes_neither_losses_nor_gradients_nor_words(): equal(['sft', 'dpo'], ['data=2,fsdp=2,tensor=2'])

@pytest.mark.slow
@pytest.mark.parametrize('accumulate', [1, 2])
def test_all_losses_on_all_shapes(accumulate):
    equal(['sft', 'reward', 'ppo', 'dpo'], SHAPES if accumulate == 1 else ['data=4', 'data=2,fsdp=2'], accumulate)
