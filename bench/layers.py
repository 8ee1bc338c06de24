"Layers in a row or in a loop (`jax.lax.scan`): which is faster here, and which compiles faster? The loop stacks the weights in every call."
import jax, jax.numpy as jnp
from flax import nnx
from rlhf_lab.core import Batch
from rlhf_lab.model import score_tokens
from timing import model_of, options, race, table

def variants(model, batch, gradient: bool) -> dict:
    "Functions that compute the same thing, one with each arrangement of the layers."
    def one(scan):
        model.scan = scan
        graph, state = nnx.split(model)
        def loss(state): return -score_tokens(nnx.merge(graph, state), batch)[0].sum()/batch.mask.sum()
        run = jax.jit(jax.grad(loss) if gradient else loss)
        return lambda: run(state)
    return dict(unrolled=one(False), scanned=one(True))

def main():
    args, rows = options(__doc__), []
    B, T = (4, 32) if args.tiny else (8, 96)
    for dtype in ('float32', 'bfloat16'):
        model = model_of(args, dtype)
        tokens = jax.random.randint(jax.random.key(1), (B, T), 0, model.config.vocab_size)
        batch = Batch(tokens, jnp.broadcast_to(jnp.arange(T) >= T//2, (B, T)))
        for gradient in (False, True):
            made = variants(model, batch, gradient)
            if not gradient: assert jnp.allclose(made['unrolled'](), made['scanned'](), rtol=.05), 'the variants compute different things'
            rows += race(dict(bench='layers', case='gradient' if gradient else 'loss', dtype=dtype), made, args.repeats, B*T)
    table(rows)

if __name__ == '__main__': main()
