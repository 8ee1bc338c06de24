"What several tests need."
import os
import pytest

# There is much to compile here and little to compute. Child processes inherit it.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

@pytest.fixture(scope='session')
def toy(tmp_path_factory) -> str:
    "The folder of a tiny model that knows nothing, with a tokenizer and a chat template."
    import jax
    from rlhf_lab.model import ModelConfig, Transformer
    from rlhf_lab.tokens import train_tokenizer
    from rlhf_lab.weights import save_model
    folder = tmp_path_factory.mktemp('toy')/'model'
    tokenizer = train_tokenizer(['The film was a joy.', 'I left early.', 'What did you think of the music?']*3, 300)
    config = ModelConfig(len(tokenizer), 16, 2, 2, 1, 8, 32, max_length=128)
    save_model(Transformer(config, key=jax.random.key(0)), tokenizer, folder)
    return str(folder)
