"How many tokens a second `generate` writes, prompts included, by batch size and precision."
import jax, numpy as np
from rlhf_lab.generate import generate
from timing import model_of, options, race, table

def main():
    args, rows = options(__doc__), []
    length, new = (16, 8) if args.tiny else (48, 32)
    for B in (1, 16, 64):
        variants = {}
        for dtype in ('float32', 'bfloat16'):
            model = model_of(args, dtype, dtype)
            prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (B, length)).tolist()
            variants[dtype] = lambda model=model, prompts=prompts: generate(model, prompts, key=jax.random.key(0), max_new_tokens=new).tokens
        rows += race(dict(bench='generate', rows=B, prompt=length, new=new), variants, args.repeats, B*new)
    table(rows)

if __name__ == '__main__': main()
