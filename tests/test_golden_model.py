"The transformer is that of the `transformers` library: logits, log-probabilities, entropies and greedy words."
import functools, json
import jax, jax.numpy as jnp, numpy as np, pytest
from flax import nnx
from goldens import double, golden, in_float64, kind
from rlhf_lab.core import Batch, CheckpointError, token_logprobs
from rlhf_lab.generate import generate
from rlhf_lab.model import score_tokens
from rlhf_lab.tokens import train_tokenizer
from rlhf_lab.weights import config_from_hf, fill, hf_arrays, load_model, read_directory, save_model

tolerance = dict(gpt2=1e-10, llama=1e-5) if double else dict(gpt2=1e-4, llama=1e-4) # the reference's Llama uses float32 inside
families = pytest.mark.parametrize('family', ['gpt2', 'llama'])

@functools.cache
def numbers(): return dict(np.load(golden/'tiny_lm.npz'))
def weights(family): return {k.removeprefix(f'{family}/weights/'): v for k, v in numbers().items() if k.startswith(f'{family}/weights/')}
def seeds(family): return sorted({k.split('/')[1] for k in numbers() if k.startswith(f'{family}/s')})
def shape(family): return json.loads((golden/f'tiny_lm.{family}.config.json').read_text())

@functools.cache
def tiny(family): return fill(config_from_hf(shape(family)), weights(family).__getitem__, kind)

@nnx.jit
def look(model, tokens): return model(tokens)

score = nnx.jit(score_tokens)

def close(found, expected, tolerance): assert np.abs(np.asarray(found) - expected).max() <= tolerance

def turned(family, seed):
    "The left-padded rows as ours: each row's tokens from slot 0, how many were cut, and where its completion is."
    z = {k: numbers()[f'{family}/{seed}/{k}'] for k in ('input_ids_left_padded_prompt', 'attention_mask', 'prompt_width')}
    tokens, real, width = z['input_ids_left_padded_prompt'], z['attention_mask'] > 0, int(z['prompt_width'])
    cut = real.argmax(1)
    rows = [np.pad(t[n:], (0, n)) for t, n in zip(tokens, cut)]
    masks = [np.pad((r & (np.arange(len(r)) >= width))[n:], (0, n)) for r, n in zip(real, cut)]
    wide = lambda x: np.pad(np.array(x), ((0, 0), (0, 16 - real.shape[1])))
    return jnp.asarray(wide(rows), jnp.int32), wide(masks), cut, real, width

@pytest.mark.skipif(double, reason='this is the float64 run')
@pytest.mark.slow
def test_all_of_this_in_float64(): in_float64(__file__)

@families
def test_logits(family):
    for seed in seeds(family):
        tokens, _, cut, real, _ = turned(family, seed)
        logits, expected = np.asarray(look(tiny(family), tokens)), numbers()[f'{family}/{seed}/logits']
        for row, (n, is_real) in enumerate(zip(cut, real)):
            close(logits[row, :len(is_real) - n][is_real[n:]], expected[row][is_real], tolerance[family])

@families
@pytest.mark.parametrize('temperature', [1.0, .7])
def test_logprobs_and_entropies(family, temperature):
    "From whole logits and in chunks."
    for seed in seeds(family):
        tokens, masks, cut, real, width = turned(family, seed)
        plain = np.asarray(token_logprobs(look(tiny(family), tokens), tokens, temperature))
        chunked, entropies = map(np.asarray, score(tiny(family), Batch(tokens, jnp.asarray(masks)), jnp.asarray(temperature, kind)))
        for row, n in enumerate(cut):
            theirs, ours = real[row, width:], slice(width - n, real.shape[1] - n)
            for name, found in [('logps', plain), ('logps', chunked), ('entropy', entropies)]:
                close(found[row, ours][theirs], numbers()[f'{family}/{seed}/response_{name}_tau{temperature}'][row][theirs], tolerance[family])
        assert (chunked[~masks] == 0).all() and (entropies[~masks] == 0).all()

@families
def test_greedy_words(family):
    "From prompts of mixed lengths together, and each alone."
    for seed in seeds(family):
        tokens, _, cut, real, width = turned(family, seed)
        expected = numbers()[f'{family}/{seed}/greedy_generation'][:, width:]
        prompts = [row[:width - n].tolist() for row, n in zip(np.asarray(tokens), cut)]
        write = lambda prompts: generate(tiny(family), prompts, key=jax.random.key(0), temperature=0, max_new_tokens=expected.shape[1], stop=(2,))
        alone = [(write(prompts[-1:]), [len(prompts) - 1])] if seed == seeds(family)[0] else []
        for rollout, rows in [(write(prompts), range(len(prompts))), *alone]:
            for i, row in enumerate(rows):
                said = np.asarray(rollout.tokens)[i][np.asarray(rollout.mask)[i]]
                end = list(expected[row]).index(2) + 1 if 2 in expected[row] else expected.shape[1]
                assert said.tolist() == expected[row][:end].tolist()

# ── on disk: nothing new to say in float64 ──

once = pytest.mark.skipif(double, reason='was tested in float32')

def shaken(family):
    "The same model with biases that are not 0 and norms that are not 1, so that none can be lost or swapped unseen."
    rng, graph_state = np.random.default_rng(0), nnx.split(tiny(family))
    return nnx.merge(graph_state[0], jax.tree.map(lambda x: x + jnp.asarray(.3*rng.normal(size=x.shape), x.dtype), graph_state[1]))

@once
@families
@pytest.mark.parametrize('shard', [4 << 30, 4000], ids=['one file', 'shards'])
def test_what_is_saved_is_loaded(family, shard, tmp_path):
    model, tokens = shaken(family), jnp.arange(20).reshape(2, 10)
    save_model(model, train_tokenizer(['a b c'], 300), tmp_path/'model', shard=shard)
    assert (len(list((tmp_path/'model').glob('*.safetensors'))) > 1) == (shard < 1 << 30)
    loaded, _ = load_model(tmp_path/'model', kind)
    assert loaded.config == model.config
    assert (look(loaded, tokens) == look(model, tokens)).all()

@families
def test_names_and_shapes_on_disk_are_those_of_transformers(family):
    "What we would write, under the names that transformers gave the golden weights."
    ours, theirs = hf_arrays(tiny(family)), weights(family)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    for name in theirs: close(ours[name], theirs[name], 1e-15 if double else 1e-7)

@once
@families
def test_every_parameter_counts(family):
    "A loader that lost one of them would be noticed above."
    model, tokens = shaken(family), jnp.arange(1, 11)[None]
    before = look(model, tokens)
    loss = nnx.jit(nnx.grad(lambda model: (model(tokens)**3).sum()))
    slopes = nnx.to_flat_state(loss(model))
    key_bias = {path for path, g in slopes if path[-2:] == ('qkv', 'bias')} # a third of it, the keys', moves no softmax
    assert all(np.abs(g[...]).max() > 1e-6 for _, g in slopes) and (family == 'gpt2') == bool(key_bias) and np.isfinite(before).all()

@once
@families
def test_prefixes_may_be_missing(family, tmp_path):
    "GPT-2 of 2019 has no `transformer.`, and the loader does not mind."
    from safetensors.numpy import save_file
    bare = {k.removeprefix('transformer.').removeprefix('model.'): v.astype('float32') for k, v in weights(family).items()}
    save_file(bare, tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(shape(family)))
    close(look(fill(*read_directory(tmp_path), kind), jnp.arange(8)[None]), look(tiny(family), jnp.arange(8)[None]), 1e-5)

@once
def test_a_lost_weight_is_named(tmp_path):
    from safetensors.numpy import save_file
    lost = {k: v.astype('float32') for k, v in weights('llama').items() if 'layers.1.mlp.up' not in k}
    save_file(lost, tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(shape('llama')))
    with pytest.raises(CheckpointError, match='layers.1.mlp.up_proj'): fill(*read_directory(tmp_path))
