"""What do a base model's states know about a preference? A logistic regression on them against one on words, every pair held out once.

`python bench/features.py pairs.jsonl.gz --model MODEL --out states.safetensors`: the states are computed once and kept in `--out`; `--seeds` cut the folds anew."""
import argparse, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file
from rlhf_lab.core import both
from rlhf_lab.data import Batches, clean_rows, load_rows, tokenize_rows
from rlhf_lab.judges import cross_validate
from rlhf_lab.reward import POOLS, fit_probe
from rlhf_lab.rows import answers
from rlhf_lab.train import TrainConfig
from rlhf_lab.weights import load_model

def states_of(rows: list, model, tokenizer, depths: list, length: int, batch_size: int) -> dict: # 'depth.pool' → [N 2 D]
    "The pooled stream after each of `depths` layers, for both answers of each row."
    examples = tokenize_rows(rows, tokenizer, length, False)
    assert len(examples) == len(rows), 'a row was left out'
    graph, state = nnx.split(model)
    @jax.jit
    def look(state, pairs):
        model, batch, found, below = nnx.merge(graph, state), both(pairs), {}, 0
        x = model.below(batch)
        for depth in depths:
            x = model.run(slice(below, depth), x, batch)
            below, known = depth, model.norm(x)
            for name, pool in POOLS.items(): found[f'{depth}.{name}'] = jnp.stack(jnp.split(pool(known, batch), 2), 1)
        return found
    batches, found, start = Batches(examples, batch_size, drop_last=False, widths=tuple(range(64, length + 1, 64))), {}, time.time()
    for i, pairs in enumerate(batches):
        for name, values in look(state, pairs).items():
            kept = found.setdefault(name, np.zeros((len(rows), *values.shape[1:]), np.float32))
            for at, value in zip(batches.index, np.asarray(values)):
                if at >= 0: kept[at] = value
        if i % 5 == 0: print(f'{i + 1}/{len(batches)} batches, {time.time() - start:.0f} s', flush=True)
    return found

def probe(states: np.ndarray, strength: float): # For `cross_validate`
    "A direction in the states, fitted to the pairs that are given."
    def fit(rows):
        weight = fit_probe(*states[[row['at'] for row in rows]].swapaxes(0, 1), strength=strength)
        return lambda others: np.subtract(*states[[row['at'] for row in others]].swapaxes(0, 1)) @ weight
    return fit

def words(rows):
    "The baseline: TF-IDF of words and their pairs, and a logistic regression on the difference."
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    sides = list(zip(*map(answers, rows)))
    count = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit([*sides[0], *sides[1]])
    change = lambda rows: np.subtract(*(count.transform(side) for side in zip(*map(answers, rows))))
    x = change(rows)
    from scipy.sparse import vstack
    learned = LogisticRegression(C=1., fit_intercept=False, max_iter=500).fit(vstack([x, -x]), np.arange(2*len(rows)) < len(rows))
    return lambda others: learned.decision_function(change(others))

def chosen_probe(states: dict, strengths=(5e-5, 5e-4, 5e-3)):
    "The layer, pooling and strength are chosen by four folds of the pairs that are given, so what is held out has no say in it."
    def fit(rows):
        def right(name, strength): return cross_validate(probe(states[name], strength), rows, k=4, seed=1)['accuracy']
        name, strength = max(((name, s) for name in states for s in strengths), key=lambda choice: right(*choice))
        print(f'  takes {name} at C = {strength}', flush=True)
        return probe(states[name], strength)(rows)
    return fit

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data')
    parser.add_argument('--model', default=TrainConfig().model)
    parser.add_argument('--out', default='states.safetensors')
    parser.add_argument('--layers', type=int, nargs='+', default=[8, 14, 20])
    parser.add_argument('--length', type=int, default=384, help='tokens of a text, a multiple of 64; what is too long loses its beginning')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, 'float32')
    rows, dropped = clean_rows(load_rows(args.data), tokenizer, args.length)
    rows = [dict(row, at=i) for i, row in enumerate(rows)]
    print(f'{len(rows)} pairs; dropped {dropped}', flush=True)
    if not Path(args.out).exists():
        save_file(states_of(rows, model, tokenizer, args.layers, args.length, args.batch_size), args.out)
    states = load_file(args.out)
    for seed in range(args.seeds):
        for name, fit in {'words': words, 'states': chosen_probe(states)}.items():
            found = cross_validate(fit, rows, seed=seed)
            print(f'seed {seed}, {name}: {found["accuracy"]:.3f} ({found["accuracy_low"]:.3f} – {found["accuracy_high"]:.3f}), folds {[round(x, 3) for x in found["folds"]]}', flush=True)

if __name__ == '__main__': main()
