"The default model, as it really comes: transformers, reading the same file by itself, thinks the same."
import json
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, pytest
from flax import nnx
from rlhf_lab.core import LabError
from rlhf_lab.generate import generate
from rlhf_lab.tokens import encode_prompt
from rlhf_lab.weights import find_model, load_model

@pytest.fixture
def the_file(monkeypatch):
    "The golden numbers are those of the packaged 4-bit file; where a hub is in reach it would give the unrounded weights."
    def nothing(*_, **__): raise OSError('the hub is left out here')
    monkeypatch.setattr('huggingface_hub.snapshot_download', nothing)
    try: return find_model()
    except LabError as error: pytest.skip(f'the weights cannot be had: {error}')

def test_smollm2_says_what_it_says_in_transformers(the_file):
    golden = json.loads((Path(__file__).parent/'golden'/'smollm2.json').read_text())
    model, tokenizer = load_model()
    prompt = encode_prompt(tokenizer, [dict(role='user', content=golden['content'])])
    assert prompt == golden['prompt']
    logprobs = np.asarray(jax.nn.log_softmax(nnx.jit(lambda model, tokens: model(tokens))(model, jnp.array([prompt]))))[0]
    assert (logprobs.argmax(-1) == np.array(golden['top_ids'])[:, 0]).all()
    assert np.abs(np.take_along_axis(logprobs, np.array(golden['top_ids']), -1) - golden['top_logprobs']).max() < 1e-3

    question = tokenizer.encode('The capital of France is')
    assert question == golden['paris']['prompt']
    rollout = generate(model, [prompt, question], key=jax.random.key(0), temperature=0, max_new_tokens=64)
    greedy, answer = (np.asarray(tokens)[np.asarray(mask)].tolist() for tokens, mask in zip(rollout.tokens, rollout.mask))
    assert greedy == golden['greedy']
    assert answer[:len(golden['paris']['greedy'])] == golden['paris']['greedy']
    assert tokenizer.decode(answer).startswith(' Paris')
