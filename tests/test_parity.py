"Tiny random models of each family: transformers and torch say what we say, from their files and from ours."
import jax, jax.numpy as jnp, numpy as np, pytest
from flax import nnx
from rlhf_lab.generate import generate
from rlhf_lab.tokens import train_tokenizer
from rlhf_lab.weights import load_model, save_model

torch = pytest.importorskip('torch', reason='parity needs torch: pip install "rlhf-lab[parity]"')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.parity

same = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, initializer_range=.2, bos_token_id=1, eos_token_id=None, pad_token_id=0)
llama3 = dict(rope_type='llama3', rope_theta=5e5, factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32)
CONFIGS = {
    'llama': lambda: transformers.LlamaConfig(**same, tie_word_embeddings=True),
    'llama, untied, wide heads': lambda: transformers.LlamaConfig(**same, head_dim=16, tie_word_embeddings=False, rms_norm_eps=1e-5),
    'llama 3 rope scaling': lambda: transformers.LlamaConfig(**same, tie_word_embeddings=False, rope_parameters=llama3),
    'qwen2': lambda: transformers.Qwen2Config(**same, tie_word_embeddings=True),
    'qwen2, untied': lambda: transformers.Qwen2Config(**same, tie_word_embeddings=False, rope_parameters=dict(rope_type='default', rope_theta=1e6)),
    'qwen3': lambda: transformers.Qwen3Config(**same, head_dim=16, tie_word_embeddings=True),
    'gpt2': lambda: transformers.GPT2Config(vocab_size=320, n_embd=32, n_layer=3, n_head=4, n_positions=256, initializer_range=.2,
        bos_token_id=1, eos_token_id=None, pad_token_id=0),
}

@pytest.fixture(scope='module', params=CONFIGS)
def pair(request, tmp_path_factory):
    "Their model, with no bias at 0 and no norm at 1, and ours, loaded from their files."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('theirs')
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param](), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if 'norm' in name or 'ln_' in name or 'bias' in name: x += .2*torch.randn_like(x)
    theirs.save_pretrained(folder)
    train_tokenizer(['a b c'], 300).save_pretrained(folder)
    return theirs, *load_model(folder)

def say(model, tokens):
    with torch.no_grad(): return model(torch.tensor(tokens)).logits.numpy()

tokens = np.random.default_rng(0).integers(3, 320, (3, 100))

def test_logits(pair):
    theirs, ours, _ = pair
    expected = say(theirs, tokens)
    assert np.abs(expected).max() > 1
    assert np.abs(np.asarray(nnx.jit(lambda model, tokens: model(tokens))(ours, jnp.asarray(tokens))) - expected).max() < 1e-4

def test_64_greedy_words(pair):
    theirs, ours, _ = pair
    prompts = [tokens[0, :5], tokens[1, :17], tokens[2, :40]]
    rollout = generate(ours, [p.tolist() for p in prompts], key=jax.random.key(0), temperature=0, max_new_tokens=64)
    for i, prompt in enumerate(prompts):
        said = theirs.generate(torch.tensor(prompt)[None], attention_mask=torch.ones(1, len(prompt), dtype=int), max_new_tokens=64,
            do_sample=False, eos_token_id=None)
        assert np.asarray(rollout.tokens)[i][np.asarray(rollout.mask)[i]].tolist() == said[0, len(prompt):].tolist()

@pytest.mark.parametrize('shard', [4 << 30, 40_000], ids=['one file', 'shards'])
def test_what_we_save_they_load(pair, shard, tmp_path):
    theirs, ours, tokenizer = pair
    save_model(ours, tokenizer, tmp_path/'ours', shard=shard)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'ours', output_loading_info=True)
    assert not report['missing_keys'] and not report['unexpected_keys'] and not report['mismatched_keys']
    assert type(loaded) is type(theirs)
    assert np.abs(say(loaded.eval(), tokens) - say(theirs, tokens)).max() < 1e-5
    assert transformers.AutoTokenizer.from_pretrained(tmp_path/'ours').encode('a b') == tokenizer.encode('a b')
