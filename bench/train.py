"One update: DPO on adapters of the top layers, with and without the states below them cached; SFT on adapters and on everything."
import jax, jax.numpy as jnp
from rlhf_lab.core import Batch, Pairs
from rlhf_lab.dpo import dpo_loss
from rlhf_lab.lora import add_lora
from rlhf_lab.sft import sft_loss
from rlhf_lab.train import adamw, init_state, make_step
from timing import model_of, options, race, table

def updates(model, loss, batch):
    "A function that makes one more update each time."
    optimizer = adamw(1e-4)
    step, held = make_step(loss, optimizer), [init_state(model, optimizer)]
    def run():
        held[0], measured = step(held[0], batch)
        return measured
    return run

def main():
    args, rows = options(__doc__), []
    B, T, top = (4, 32, 2) if args.tiny else (16, 64, 8)
    tokens = lambda seed: jax.random.randint(jax.random.key(seed), (B, T), 0, 500)
    batch = lambda seed: Batch(tokens(seed), jnp.broadcast_to(jnp.arange(T) >= T//2, (B, T)))
    for dtype in ('float32', 'bfloat16'):
        policy = add_lora(model_of(args, dtype, dtype), key=jax.random.key(2), top=top)
        pairs = Pairs(batch(0), batch(1), jnp.zeros(B), jnp.zeros(B))
        below = jax.jit(lambda batch: policy.below(batch).astype(dtype))
        cached = pairs.replace(**{side: getattr(pairs, side).replace(below=below(getattr(pairs, side))) for side in ('chosen', 'rejected')})
        variants = {f'adapters on {top} layers': updates(policy, dpo_loss, pairs), 'states below cached': updates(policy, dpo_loss, cached)}
        rows += race(dict(bench='train', case='DPO', dtype=dtype), variants, args.repeats, 2*B*T)
        variants = {f'adapters on {top} layers': updates(policy, sft_loss, batch(0)), 'all weights': updates(model_of(args, dtype), sft_loss, batch(0))}
        rows += race(dict(bench='train', case='SFT', dtype=dtype), variants, args.repeats, B*T)
    table(rows)

if __name__ == '__main__': main()
