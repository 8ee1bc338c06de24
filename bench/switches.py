"""What makes an update fast and small, one thing at a time: off or on, against how the quickstart does it. DPO on 8 pairs, PPO on 8 rows, both of 80 tokens.

Beside the time stands what the compiled program needs: weights, moments and batch, and what lives in between; and how far its loss is from the first one's."""
import json, os
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from rlhf_lab.core import Batch, Pairs, Rollout, both, token_logprobs
from rlhf_lab.dpo import dpo_loss, reference_logprobs
from rlhf_lab.lora import add_head, add_lora
from rlhf_lab.machine import needed
from rlhf_lab.ppo import ActorCritic, ppo_loss
from rlhf_lab.sft import sft_loss
from rlhf_lab.train import adamw, init_state, make_step
from timing import model_of, options, race

ROWS, LENGTH, START, PROMPT = 8, 80, 29, 40 # What the quickstart's pairs look like

def shape(args) -> tuple: return (4, 32, 9, 16, 2) if args.tiny else (ROWS, LENGTH, START, PROMPT, 6) # and adapters on so many layers

def rows_like(args, seed: int) -> Batch:
    "Random words: all rows begin alike, and the two sides of a pair go on alike."
    B, T, start, prompt, _ = shape(args)
    tokens = np.random.default_rng(0).integers(0, 500, (B, T))
    tokens[:, :start] = tokens[0, :start]
    tokens[:, prompt:] = np.random.default_rng(seed).integers(0, 500, (B, T - prompt))
    return Batch(jnp.asarray(tokens, jnp.int32), jnp.broadcast_to(jnp.arange(T) >= prompt, (B, T)), shared=start)

def all_at_once(model, pairs):
    "DPO with the guesses for every position in memory: `[2B T V]`."
    sides = both(pairs)
    logprobs = (token_logprobs(model.logits(model.hidden(sides)), sides.tokens)*sides.mask).sum(1)
    chosen, rejected = jnp.split(logprobs, 2)
    losses = -jax.nn.log_sigmoid(.1*(chosen - pairs.ref_chosen - rejected + pairs.ref_rejected))
    return losses.sum(), jnp.float32(len(losses)), {}

def keep(model, pairs: Pairs) -> Pairs:
    "The pairs, with the states that enter the adapted layers."
    halves = jnp.split(jax.jit(lambda batch: model.below(batch).astype(model.dtype))(both(pairs)), 2)
    return pairs.replace(**{side: getattr(pairs, side).replace(below=half) for side, half in zip(('chosen', 'rejected'), halves)})

def dpo_variants(args) -> dict: # Name → (model, loss, batch, slices of an update)
    "The quickstart's DPO update first; each of the others differs in one thing."
    base, top, key = model_of(args, 'float32'), shape(args)[-1], jax.random.key(2)
    adapt = lambda model, **how: add_lora(model, key=key, **how)
    plain = Pairs(rows_like(args, 1), rows_like(args, 2), alike=shape(args)[3])
    plain = reference_logprobs(base, plain)
    alone = lambda pairs, shared: pairs.replace(alike=0, **{side: getattr(pairs, side).replace(shared=shared) for side in ('chosen', 'rejected')})
    policy, kept, start = adapt(base, top=top), None, shape(args)[2]
    kept = keep(policy, plain)
    def changed(**how):
        model = adapt(model_of(args, 'float32'), top=top)
        for name, value in how.items(): setattr(model, name, value)
        return model
    half = adapt(model_of(args, 'bfloat16', 'bfloat16'), top=top)
    return {'as the quickstart does it': (policy, dpo_loss, kept, 1),
        'states below are not kept': (policy, dpo_loss, plain, 1),
        "a pair's prompt is read twice": (policy, dpo_loss, alone(kept, start), 1),
        'the common start is read in every row, too': (policy, dpo_loss, alone(kept, 0), 1),
        'all guesses at once': (policy, all_at_once, kept, 1),
        'in four slices': (policy, dpo_loss, kept, 4),
        'activations computed again (remat)': (changed(remat=True), dpo_loss, kept, 1),
        'layers in a loop (scan)': (changed(scan=True), dpo_loss, kept, 1),
        'products in bfloat16': (half, dpo_loss, keep(half, plain), 1),
        'adapters on all layers': (adapt(base), dpo_loss, plain, 1),
        'all weights': (base, dpo_loss, plain, 1)}

def ppo_variants(args) -> dict: # As above
    "Four roles on one trunk, against imitation on the same trunk and rows."
    B, T, *_, top = shape(args)
    base, rows = model_of(args, 'float32'), rows_like(args, 1)
    policy = add_lora(base, key=jax.random.key(2), top=top)
    judged = add_head(policy, key=jax.random.key(3))
    below = jax.jit(lambda batch: policy.below(batch))(rows)
    rollout = Rollout(rows.tokens, rows.mask, shared=rows.shared, below=below, **{name: jnp.zeros((B, T)) for name in ('logprobs', 'values', 'advantages', 'returns')})
    other = add_head(add_lora(model_of(args, 'float32'), key=jax.random.key(4)), key=jax.random.key(5))
    return {'SFT on the same trunk': (policy, sft_loss, rows.replace(below=below), 1),
        'PPO, critic on the same trunk': (ActorCritic(judged), ppo_loss, rollout, 1),
        'PPO, critic with a trunk of its own': (ActorCritic(policy, other), ppo_loss, rollout, 1)}

def updates(model, loss, batch, slices: int) -> tuple: # A function that makes one more update, and what is known of it
    optimizer = adamw(1e-3)
    step, held, losses = make_step(loss, optimizer, slices), [init_state(model, optimizer)], []
    fixed, between = needed(step, held[0], batch)
    def run():
        held[0], measured = step(held[0], batch)
        losses.append(measured['loss'])
        return measured
    return run, losses, dict(fixed_mb=fixed/1e6, between_mb=between/1e6)

def measure(case: str, variants: dict, args) -> list[dict]:
    "Time them in turns; the loss is that of the fifth update, so it tells whether all of them were the same."
    made = {name: updates(*how) for name, how in variants.items()}
    B, T, *_ = shape(args)
    rows = race(dict(bench='switches', case=case), {name: run for name, (run, *_) in made.items()}, max(3, args.repeats), (2 if case == 'DPO' else 1)*B*T)
    for row in rows:
        _, losses, facts = made[row['variant']]
        row.update(facts, loss=float(losses[4]))
    return rows

def main():
    args = options(__doc__)
    rows = measure('DPO', dpo_variants(args), args) + measure('PPO', ppo_variants(args), args)
    print('\n| case | variant | time | ms (min – max) | weights, moments, batch, MB | in between, MB | loss of the fifth update | first call, s |\n| --- | --- |' + ' --: |'*6)
    for row in rows: print('| {case} | {variant} | {ratio:.2f} | {ms:.0f} ({ms_min:.0f} – {ms_max:.0f}) | {fixed_mb:.0f} | {between_mb:.0f} | {loss:.6f} | {first_call_seconds:.0f} |'.format(**row))
    if args.out: Path(args.out).write_text(json.dumps(dict(machine=f'{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}', shape=shape(args), rows=rows), indent=1) + '\n')

if __name__ == '__main__': main()
