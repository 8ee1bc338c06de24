"What the tests against other people's numbers share."
import functools, json, os, re, subprocess, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, pytest
from flax import nnx
from rlhf_lab.core import Batch, Pairs
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

@functools.cache
def tiny():
    "The tiny GPT-2."
    z, config = load('tiny_lm'), json.loads((golden/'tiny_lm.gpt2.config.json').read_text())
    return fill(config_from_hf(config), lambda name: z[f'gpt2/weights/{name}'], kind)

def in_float64(file):
    "The tests of a file once more, to 1e-10."
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', file],
        env=dict(os.environ, JAX_ENABLE_X64='1', JAX_PLATFORMS='cpu'), cwd=golden.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
