"""The lab beside what one would use instead (TRL, peft, transformers): same weights, same tokens, same cores, in turns.

Each variant lives in a process of its own, so that its peak memory is its own; one of them works at a time.
Needs `pip install 'rlhf_lab[bench]'`."""
import argparse, json, os, select, statistics, subprocess, sys, tempfile, time
from pathlib import Path

LONG, NEW, PAIRS = 64, 64, 4 # Tokens of a prompt and of a completion; pairs in an update
AIMS = {'dpo': 2.3, 'dpo known': 1.7, 'dpo lora': 2.3, 'dpo top': 6., 'reward': 1.5, 'sft': 1.7, 'sft packed': 2.5, 'grpo': 2.5, 'generate 16': 1.5, 'generate 1': 1.5}

# ── the same texts for all: words that are one token each, so that each text has the length it should have ──

def folder() -> str:
    "SmolLM2-135M-Instruct as a Hugging Face directory."
    from rlhf_lab.weights import find_model, load_model, save_model
    place = find_model()
    if place.is_dir(): return str(place)
    kept = Path(tempfile.gettempdir())/'rlhf_lab_bench_model'
    if not kept.exists(): save_model(*load_model(), kept)
    return str(kept)

def writer(tokenizer, seed: int):
    "A function that writes a text of so many tokens."
    import numpy as np
    words = [word for i in range(1_000, 12_000) if (word := tokenizer.decode([i])).startswith(' ') and word[1:].isalpha() and word.isascii()]
    random = np.random.default_rng(seed)
    def write(length):
        text = ''.join(random.choice(words, length))
        assert len(tokenizer.encode(text, add_special_tokens=False)) == length
        return text
    return write

def pair_texts(tokenizer, count: int) -> list:
    "Prompt, chosen, rejected; a completion's last token is the EOS that the trainers add."
    write = writer(tokenizer, 0)
    return [dict(prompt=write(LONG), chosen=write(NEW - 1), rejected=write(NEW - 1)) for _ in range(count)]

def ragged(count: int = 64) -> list:
    "How long the completions of the packed comparison are: most are short, as in chats."
    import numpy as np
    return np.clip(np.random.default_rng(1).lognormal(3.2, .8, count), 8, 128).astype(int).tolist()

# ── ours ──

def our_model():
    from rlhf_lab.model import fast_precision
    from rlhf_lab.weights import load_model
    return load_model(folder(), 'float32', fast_precision())

def our_rows(tokenizer, rows: list, width: int):
    "Prompt and completion as a `Batch`, the EOS included."
    import jax.numpy as jnp, numpy as np
    from rlhf_lab.core import Batch
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, (prompt, completion) in enumerate(rows):
        a, b = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, completion))
        ids = [*a, *b, tokenizer.eos_token_id]
        tokens[i, :len(ids)], mask[i, len(a):len(ids)] = ids, True
    return Batch(jnp.asarray(tokens), jnp.asarray(mask))

def our_pairs(tokenizer):
    from rlhf_lab.core import Pairs
    from rlhf_lab.data import first_difference
    rows = pair_texts(tokenizer, PAIRS)
    sides = [our_rows(tokenizer, [(row['prompt'], row[side]) for row in rows], LONG + NEW) for side in ('chosen', 'rejected')]
    return Pairs(*sides, alike=min(map(first_difference, *(side.tokens for side in sides)))//8*8) # as `Batches` finds it

def updates(model, loss, ready, rate: float = 1e-6):
    "A function that makes one update; `ready` makes its batch, as a training would."
    import jax
    from rlhf_lab.train import adamw, init_state, make_step
    optimizer = adamw(rate)
    step, held = make_step(loss, optimizer), [init_state(model, optimizer)]
    def run():
        held[0], measured = step(held[0], ready())
        jax.block_until_ready((held[0].params, measured))
    return run

def our_dpo(known: bool, lora: bool = False):
    import jax
    from flax import nnx
    from rlhf_lab.dpo import dpo_loss, reference_logprobs
    from rlhf_lab.lora import add_lora
    model, tokenizer = our_model()
    policy = add_lora(model, key=jax.random.key(0)) if lora else model
    graph, state = nnx.split(model)
    think = jax.jit(lambda state, pairs: reference_logprobs(nnx.merge(graph, state), pairs))
    pairs = our_pairs(tokenizer)
    if not known: return updates(policy, dpo_loss, lambda: think(state, pairs))
    pairs = think(state, pairs)
    return updates(policy, dpo_loss, lambda: pairs)

def our_top():
    "Three updates on the same pairs, as in three epochs, for one reading of the lower layers."
    import jax
    from flax import nnx
    from rlhf_lab.core import both
    from rlhf_lab.dpo import dpo_loss, reference_logprobs
    from rlhf_lab.lora import add_lora, drop_lora
    model, tokenizer = our_model()
    policy, pairs = add_lora(model, key=jax.random.key(0), top=6), our_pairs(tokenizer)
    graph, state = nnx.split(drop_lora(policy))
    @jax.jit
    def read(state, pairs):
        reference = nnx.merge(graph, state)
        below = reference.below(both(pairs)).astype(reference.dtype)
        halves = dict(zip(('chosen', 'rejected'), (below[:PAIRS], below[PAIRS:])))
        return reference_logprobs(reference, pairs.replace(**{side: getattr(pairs, side).replace(below=halves[side]) for side in halves}))
    held = []
    step = updates(policy, dpo_loss, lambda: held[0])
    def run():
        held[:] = [read(state, pairs)]
        for _ in range(3): step()
    return run

def our_reward():
    import jax
    from rlhf_lab.lora import add_head
    from rlhf_lab.reward import reward_loss
    model, tokenizer = our_model()
    pairs = our_pairs(tokenizer)
    return updates(add_head(model, key=jax.random.key(0)), reward_loss, lambda: pairs)

def our_sft():
    from rlhf_lab.sft import sft_loss
    model, tokenizer = our_model()
    batch = our_rows(tokenizer, [(row['prompt'], row['chosen']) for row in pair_texts(tokenizer, 2*PAIRS)], LONG + NEW)
    return updates(model, sft_loss, lambda: batch)

def our_packed():
    "All the ragged examples once."
    import numpy as np
    from rlhf_lab.data import Batches, Example
    from rlhf_lab.sft import sft_loss
    model, tokenizer = our_model()
    write = writer(tokenizer, 2)
    examples = [Example(np.array(tokenizer.encode(write(n - 1), add_special_tokens=False) + [tokenizer.eos_token_id]), np.arange(n) > 0) for n in ragged()]
    held = list(Batches(examples, 8, 0, widths=(128,), pack=True))
    turn = iter([])
    one = updates(model, sft_loss, lambda: next(turn))
    def run():
        nonlocal turn
        turn = iter(held)
        for _ in held: one()
    return run

def our_rollouts(method: str):
    "One rollout of 8 prompts × 2 completions of 32 tokens, priced by a reference, and one update on it."
    import jax
    from flax import nnx
    from rlhf_lab.lora import add_head
    from rlhf_lab.ppo import ActorCritic, practise
    from rlhf_lab.practise import OnlineConfig, PPOConfig, method_of
    from rlhf_lab.reward import model_reward, last_token
    from rlhf_lab.train import adamw, init_state
    model, tokenizer = our_model()
    write = writer(tokenizer, 3)
    prompts = [tokenizer.encode(write(LONG), add_special_tokens=False) for _ in range(64)]
    how = dict(batch_size=16, minibatches=1, max_new_tokens=32, stop_at_eos=False, kl_coef=.04, learning_rate=1e-6, kl_stop=0.)
    optimizer, words = adamw(1e-6), lambda rollout: (rollout.tokens % 3 == 0).sum(1).astype('float32')
    if method == 'ppo': # four roles: policy, reference, value, and a reward model
        judge = add_head(model, key=jax.random.key(1))
        config, extra, reward = PPOConfig(**how), {}, model_reward(judge, last_token)
        policy = add_head(model, key=jax.random.key(2))
    else:
        config = OnlineConfig(method='grpo', group=2, **how)
        extra, reward, policy = dict(group=2, **method_of(config)), words, model
    state = init_state(ActorCritic(policy), optimizer, wrt=nnx.Param)
    rounds = practise(state, model, prompts, reward, optimizer, config, **extra)
    return lambda: next(rounds) and None

def our_generate(rows: int):
    import jax
    from rlhf_lab.generate import generate
    model, tokenizer = our_model()
    write = writer(tokenizer, 4)
    prompts = [tokenizer.encode(write(32), add_special_tokens=False) for _ in range(rows)]
    return lambda: generate(model, prompts, key=jax.random.key(0), max_new_tokens=64).tokens.block_until_ready()

# ── theirs ──

class Turns:
    "Lets a trainer make one update at a time, in a thread of its own."
    def __init__(self, trainer, each: int = 1): # `each`: updates in a turn
        import threading
        from transformers import TrainerCallback
        self.go, self.done, self.each, self.failed = threading.Semaphore(0), threading.Semaphore(0), each, None
        turns = self
        class Wait(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step % turns.each == 0: turns.go.acquire()
            def on_step_end(self, args, state, control, **_):
                if state.global_step % turns.each == 0: turns.done.release()
        trainer.add_callback(Wait())
        def work():
            try: trainer.train()
            except BaseException as error: self.failed = error
            finally: self.done.release()
        threading.Thread(target=work, daemon=True).start()

    def __call__(self):
        self.go.release(); self.done.acquire()
        if self.failed: raise self.failed

def settings(kind, batch: int, fast: bool, **more):
    "A peer's defaults; `fast`: float32 and no recomputation, which is quicker where bfloat16 is emulated."
    quicker = dict(bf16=False, gradient_checkpointing=False) if fast else {}
    return kind(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, max_steps=10_000, learning_rate=1e-6, report_to='none', use_cpu=True,
        save_strategy='no', logging_strategy='no', disable_tqdm=True, **quicker, **more)

def their_model(dtype: str = 'float32', kind: str = 'CausalLM', **more):
    import transformers
    return getattr(transformers, f'AutoModelFor{kind}').from_pretrained(folder(), dtype=dtype, **more)

def their_tokenizer():
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder())
    if tokenizer.pad_token is None: tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

def lora():
    from peft import LoraConfig
    return LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', task_type='CAUSAL_LM')

def rows_of(texts: list):
    from datasets import Dataset
    return Dataset.from_list(texts)

def their_dpo(fast: bool = True, known: bool = False, dtype: str = 'float32', adapter: bool = False):
    from trl import DPOConfig, DPOTrainer
    tokenizer = their_tokenizer()
    config = settings(DPOConfig, PAIRS, fast, precompute_ref_log_probs=known, max_length=LONG + NEW)
    return Turns(DPOTrainer(their_model(dtype), args=config, train_dataset=rows_of(pair_texts(tokenizer, PAIRS)), processing_class=tokenizer,
        peft_config=lora() if adapter else None))

def their_reward():
    from trl import RewardConfig, RewardTrainer
    tokenizer = their_tokenizer()
    model = their_model(kind='SequenceClassification', num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    return Turns(RewardTrainer(model, args=settings(RewardConfig, PAIRS, True, max_length=LONG + NEW), processing_class=tokenizer,
        train_dataset=rows_of(pair_texts(tokenizer, PAIRS))))

def their_sft():
    from trl import SFTConfig, SFTTrainer
    tokenizer = their_tokenizer()
    rows = [dict(prompt=row['prompt'], completion=row['chosen']) for row in pair_texts(tokenizer, 2*PAIRS)]
    return Turns(SFTTrainer(their_model(), args=settings(SFTConfig, 2*PAIRS, True, max_length=LONG + NEW), processing_class=tokenizer, train_dataset=rows_of(rows)))

def their_ragged():
    from trl import SFTConfig, SFTTrainer
    tokenizer = their_tokenizer()
    write = writer(tokenizer, 2)
    rows = [dict(text=write(n - 1)) for n in ragged()]
    return Turns(SFTTrainer(their_model(), args=settings(SFTConfig, 8, True, max_length=128), processing_class=tokenizer, train_dataset=rows_of(rows)),
        each=len(rows)//8)

def their_grpo():
    from trl import GRPOConfig, GRPOTrainer
    tokenizer = their_tokenizer()
    write = writer(tokenizer, 3)
    config = settings(GRPOConfig, 16, True, num_generations=2, max_completion_length=32, beta=.04, generation_kwargs=dict(min_new_tokens=32))
    return Turns(GRPOTrainer(their_model(), lambda completions, **_: [float(len(text) % 7) for text in completions], args=config, processing_class=tokenizer,
        train_dataset=rows_of([dict(prompt=write(LONG)) for _ in range(64)])))

def their_generate(rows: int, dtype: str = 'float32'):
    import torch
    model, tokenizer = their_model(dtype).eval(), their_tokenizer()
    write = writer(tokenizer, 4)
    inputs = tokenizer([write(32) for _ in range(rows)], return_tensors='pt', add_special_tokens=False)
    def run():
        with torch.inference_mode(): model.generate(**inputs, do_sample=True, top_k=0, min_new_tokens=64, max_new_tokens=64, pad_token_id=0)
    return run

# ── case → (tokens in a turn, name → function that gets ready and returns a turn) ──

def cases() -> dict:
    both, made = 2*PAIRS*(LONG + NEW), 16*32
    return {
        'dpo': (both, {'ours': lambda: our_dpo(False), 'TRL': lambda: their_dpo(), 'TRL, its defaults': lambda: their_dpo(fast=False)}),
        'dpo known': (both, {'ours': lambda: our_dpo(True), 'TRL': lambda: their_dpo(known=True),
            'TRL, bfloat16 weights': lambda: their_dpo(known=True, dtype='bfloat16')}),
        'dpo lora': (both, {'ours': lambda: our_dpo(True, True), 'TRL': lambda: their_dpo(known=True, adapter=True)}),
        'dpo top': ((3*both, both), {'ours': our_top, 'TRL': lambda: their_dpo(known=True, adapter=True)}),
        'reward': (both, {'ours': our_reward, 'TRL': their_reward}),
        'sft': (both, {'ours': our_sft, 'TRL': their_sft}),
        'sft packed': (sum(ragged()), {'ours': our_packed, 'TRL': their_ragged}),
        'grpo': (made, {'ours': lambda: our_rollouts('grpo'), 'TRL': their_grpo, 'our PPO, four roles': lambda: our_rollouts('ppo')}),
        'generate 16': (16*64, {'ours': lambda: our_generate(16), 'transformers': lambda: their_generate(16)}),
        'generate 1': (64, {'ours': lambda: our_generate(1), 'transformers': lambda: their_generate(1)}),
    }

def work(case: str, variant: str):
    "A worker: gets ready, then does a turn for each line it is sent."
    import resource
    talk = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1) # what libraries print is not for the parent
    run = cases()[case][1][variant]()
    tell = lambda **said: print(json.dumps(said), file=talk, flush=True)
    tell(ready=True)
    for n, _ in enumerate(sys.stdin):
        if n: run() # not timed: what a process has not touched for some seconds, a virtual machine may have taken away
        start = time.perf_counter()
        run()
        tell(seconds=time.perf_counter() - start, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)

class Worker:
    "A variant in a process of its own."
    def __init__(self, case: str, variant: str, patience: float):
        self.patience = patience # Seconds to get ready, and for a turn
        env = dict(os.environ, HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', TRANSFORMERS_VERBOSITY='error', HF_DATASETS_DISABLE_PROGRESS_BARS='1')
        self.log = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen([sys.executable, __file__, '--work', case, variant], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env)
        self.hear()
        self.first = self.turn()['seconds']

    def hear(self) -> dict: # Raises TimeoutError
        if not select.select([self.process.stdout], [], [], self.patience)[0]: self.end(); raise TimeoutError
        if line := self.process.stdout.readline(): return json.loads(line)
        self.log.seek(0)
        raise SystemExit('\n'.join(self.log.read().strip().split('\n')[-12:]))

    def turn(self) -> dict:
        print('go', file=self.process.stdin, flush=True)
        return self.hear()

    def end(self): self.process.kill(); self.process.wait()

def measure(case: str, repeats: int, patience: float) -> list[dict]:
    "A row for each variant of a case; ratios are of tokens per second, ours to theirs."
    tokens, variants = cases()[case]
    counts = dict(zip(variants, tokens if isinstance(tokens, tuple) else [tokens]*len(variants)))
    workers = {}
    for name in variants:
        try: workers[name] = Worker(case, name, patience)
        except TimeoutError: print(json.dumps(dict(bench='peers', case=case, variant=name, gave_up_after_seconds=patience)), flush=True)
    heard = {name: [] for name in workers}
    for _ in range(repeats):
        for name, worker in workers.items():
            try: heard[name].append(worker.turn())
            except TimeoutError: raise SystemExit(f'{case}, {name}: a turn took more than {patience:g} s; give it more --patience') from None
    for worker in workers.values(): worker.end()
    seconds = {name: [told['seconds'] for told in turns] for name, turns in heard.items()}
    speed = {name: counts[name]/statistics.median(took) for name, took in seconds.items()}
    rows = []
    for name, took in seconds.items():
        rows.append(dict(bench='peers', case=case, variant=name, ms=1e3*statistics.median(took), ms_min=1e3*min(took), ms_max=1e3*max(took), ratio=speed['ours']/speed[name],
            tokens_per_second=speed[name], first_call_seconds=workers[name].first, peak_mb=heard[name][-1]['peak_mb'], repeats=repeats))
        print(json.dumps({key: round(x, 3) if isinstance(x, float) else x for key, x in rows[-1].items()}), flush=True)
    return rows

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=5, help='timed turns of each variant')
    parser.add_argument('--patience', type=float, default=180, help='seconds that a turn may take; a variant that needs more is left out, and that is said')
    parser.add_argument('--cases', default='', help='some of them, with commas between: ' + ', '.join(AIMS))
    parser.add_argument('--work', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work: return work(*args.work)
    chosen = [name.strip() for name in args.cases.split(',')] if args.cases else list(AIMS)
    if unknown := set(chosen) - set(AIMS): raise SystemExit(f'there is no case {min(unknown)!r}: choose from ' + ', '.join(AIMS))
    missing = [name for name in ('torch', 'trl', 'peft') if subprocess.run([sys.executable, '-c', f'import {name}'], capture_output=True).returncode]
    if missing: raise SystemExit(f'{", ".join(missing)}: not installed; pip install "rlhf_lab[bench]"')
    rows = [row for case in chosen for row in measure(case, args.repeats, args.patience)]
    print(f'\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n\n| case | variant | ms (min – max) | tokens/s | ours is × | aim | peak MB | first turn, s |\n|' + ' --- |'*2 + ' --: |'*6)
    for row in rows:
        aim = AIMS[row['case']] if row['variant'] not in ('ours', 'our PPO, four roles') else ''
        print('| {case} | {variant} | {ms:.0f} ({ms_min:.0f} – {ms_max:.0f}) | {tokens_per_second:.0f} | {ratio:.2f} | {aim} | {peak_mb:.0f} | {first_call_seconds:.0f} |'.format(**row, aim=aim))

if __name__ == '__main__': main()
