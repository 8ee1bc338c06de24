"Adapters are those of peft."
import jax, jax.numpy as jnp, pytest
from flax import nnx
from goldens import array, close, double, each, in_float64, kind, load
from rlhf_lab.lora import LoRA
from rlhf_lab.model import Linear

@pytest.mark.skipif(double, reason='this is the float64 run')
@pytest.mark.slow
def test_all_of_this_in_float64(): in_float64(__file__)

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
