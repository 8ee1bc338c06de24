"How to time: compile first, let the variants take turns, tell the median with its extremes. One JSON line a measurement, then a table."
import argparse, json, os, statistics, time
import jax
from rlhf_lab.model import ModelConfig, Transformer

SMOLLM = ModelConfig(49152, 576, 30, 9, 3, 64, 1536, rope_theta=1e5) # the shape of SmolLM2-135M
TINY = ModelConfig(512, 64, 4, 4, 2, 16, 128) # to see that a script works

def options(about: str) -> argparse.Namespace:
    "The flags that all scripts have."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument('--repeats', type=int, default=7, help='timed runs of each variant')
    parser.add_argument('--tiny', action='store_true', help='a toy shape: does the script work?')
    parser.add_argument('--out', default='', help='write the measurements to this file, with what they were made on')
    return parser.parse_args()

def model_of(args, dtype: str, stored: str = 'float32') -> Transformer:
    "A model with random weights; `dtype` is that of the products, `stored` that of the matrices."
    from flax import nnx
    model = Transformer(TINY if args.tiny else SMOLLM, key=jax.random.key(0), dtype=dtype)
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(stored) if x.ndim > 1 else x, state))

def race(
    case: dict, # What all variants have in common
    variants: dict, # Name → function without arguments
    repeats: int,
    tokens: int, # That one run works on
) -> list[dict]: # A row for each variant
    "Time the variants in turn; ratios are to the first one."
    took, compiled = {name: [] for name in variants}, {}
    for name, run in variants.items():
        start = time.perf_counter()
        jax.block_until_ready(run())
        compiled[name] = time.perf_counter() - start
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            took[name].append(time.perf_counter() - start)
    rows, first = [], statistics.median(next(iter(took.values())))
    for name, seconds in took.items():
        middle = statistics.median(seconds)
        rows.append(dict(case, variant=name, ms=1e3*middle, ms_min=1e3*min(seconds), ms_max=1e3*max(seconds), ratio=middle/first,
            tokens_per_second=tokens/middle, first_call_seconds=compiled[name], repeats=repeats))
        print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()}), flush=True)
    return rows

def table(rows: list[dict]):
    "All measurements for people."
    print(f'\n{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, load {os.getloadavg()[0]:.1f}\n')
    names = [name for name in rows[0] if name not in ('variant', 'repeats') and not name.startswith(('ms', 'ratio', 'tokens', 'first'))]
    print('| ' + ' | '.join([*names, 'variant', 'ms (min – max)', 'ratio', 'tokens/s', 'first call, s']) + ' |')
    print('|' + ' --- |'*(len(names) + 1) + ' --: |'*4)
    for row in rows:
        cells = [str(row[name]) for name in (*names, 'variant')]
        cells += ['{ms:.1f} ({ms_min:.1f} – {ms_max:.1f})', '{ratio:.2f}', '{tokens_per_second:.0f}', '{first_call_seconds:.1f}']
        print('| ' + ' | '.join(cells).format(**row) + ' |')
