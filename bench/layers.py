"Layers in a row or in a loop (`jax.lax.scan` over stacked weights): which is faster here, and which compiles faster?"
import jax, jax.numpy as jnp
from flax import nnx
from rlhf_lab.core import Batch
from rlhf_lab.generate import decode
from rlhf_lab.model import causal_mask, row_positions, score_tokens
from timing import model_of, options, race, table

def stack(model): # (outer state, layer states [L …]), and how to use them
    "The model with its layers stacked beforehand, which is the best case for a loop."
    layer = nnx.graphdef(model.layers[0])
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *[nnx.state(block) for block in model.layers])
    shell = nnx.merge(*nnx.split(model), copy=True)
    shell.layers = nnx.List([])
    graph, outer = nnx.split(shell)
    return (outer, stacked), lambda outer: nnx.merge(graph, outer), lambda state: nnx.merge(layer, state)

def hidden(shell, block, stacked, batch):
    "The last states, with a loop over layers."
    places = row_positions(batch.tokens)
    angles, mask = shell.angles(places), causal_mask(batch.tokens)
    step = lambda x, state: (block(state)(x, angles, mask)[0], None)
    return shell.norm(jax.lax.scan(step, shell.start(batch.tokens, places), stacked)[0])

def loss(model, batch, states): return -score_tokens(model, batch, hidden=states)[0].sum()/batch.mask.sum()

def decode_loop(shell, block, stacked, token, lengths, start, t, cache):
    "`decode` with a loop over layers and a stacked cache."
    places, slots = (lengths + t)[:, None], jnp.arange(cache[0].shape[3])
    mask = ((slots < lengths[:, None]) | (slots >= start) & (slots <= start + t))[:, None, None]
    angles = shell.angles(places)
    step = lambda x, each: block(each[0])(x, angles, mask, (*each[1], start + t))
    x, cache = jax.lax.scan(step, shell.start(token[:, None], places), (stacked, cache))
    return shell.logits(shell.norm(x[:, 0])), cache

def repeat(one, token, cache, steps):
    "Write `steps` tokens, the likeliest ones."
    def step(t, carry):
        logits, cache = one(carry[0], t, carry[1])
        return logits.argmax(-1).astype(jnp.int32), cache
    return jax.lax.fori_loop(0, steps, step, (token, cache))[0]

def forward(model, batch):
    graph, state = nnx.split(model)
    row = jax.jit(lambda state: nnx.merge(graph, state).hidden(batch))
    both, shell, block = stack(model)
    loop = jax.jit(lambda both: hidden(shell(both[0]), block, both[1], batch))
    return dict(unrolled=lambda: row(state), scanned=lambda: loop(both))

def train(model, batch):
    graph, state = nnx.split(model)
    def row_loss(state): return loss(model := nnx.merge(graph, state), batch, model.hidden(batch))
    both, shell, block = stack(model)
    def loop_loss(both): return loss(model := shell(both[0]), batch, hidden(model, block, both[1], batch))
    row, loop = jax.jit(jax.grad(row_loss)), jax.jit(jax.grad(loop_loss))
    return dict(unrolled=lambda: row(state), scanned=lambda: loop(both))

def write(model, tokens, steps):
    (B, P), c, (graph, state) = tokens.shape, model.config, nnx.split(model)
    lengths, (both, shell, block) = jnp.full(B, P), stack(model)
    part = jnp.zeros((B, c.num_kv_heads, P + steps, c.head_dim))
    many = (jnp.zeros((c.num_layers, *part.shape)),)*2
    row = jax.jit(lambda state: repeat(lambda token, t, cache: decode(nnx.merge(graph, state), token, lengths, P, t, cache),
        tokens[:, -1], [(part, part) for _ in range(c.num_layers)], steps))
    loop = jax.jit(lambda both: repeat(lambda token, t, cache: decode_loop(shell(both[0]), block, both[1], token, lengths, P, t, cache),
        tokens[:, -1], many, steps))
    return dict(unrolled=lambda: row(state), scanned=lambda: loop(both))

def agree(one, other): return bool(jnp.allclose(one(), other(), rtol=.05, atol=.05))

def main():
    args, rows = options(__doc__), []
    B, T, steps = (4, 32, 4) if args.tiny else (8, 96, 16)
    for dtype in ('float32', 'bfloat16'):
        model, frozen = model_of(args, dtype), model_of(args, dtype, dtype)
        tokens = jax.random.randint(jax.random.key(1), (B, T), 0, model.config.vocab_size)
        batch = Batch(tokens, jnp.broadcast_to(jnp.arange(T) >= T//2, (B, T)))
        cases = dict(forward=(forward(frozen, batch), B*T), gradient=(train(model, batch), B*T), decode=(write(frozen, tokens, steps), B*steps))
        for name in ('forward', 'decode'): assert agree(*cases[name][0].values()), f'{name}: the variants compute different things'
        for name, (variants, count) in cases.items(): rows += race(dict(bench='layers', case=name, dtype=dtype), variants, args.repeats, count)
    table(rows)

if __name__ == '__main__': main()
