"What several tests need."
import os
import pytest

# There is much to compile here and little to compute. Child processes inherit it.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
os.environ.setdefault('XLA_FLAGS', '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1') # a quarter less time than without
# And what was compiled once is there when the tests run again, in the folder where the command line keeps such things.
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
import jax
from rlhf_lab.cli import keep_programs
keep_programs()
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', jax.config.jax_compilation_cache_dir)
os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(jax.config.jax_compilation_cache_max_size))

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

# What takes longest, longest first. With two processes nothing long is then left when one of them has no more to do.
LONG = '''test_quickstart test_app test_hosts test_regressions afternoon 62_first test_prefer 45_judges 34_dpo 32_reward 20_model test_cli 35_online 31_sft
    30_train 47_compare 44_quickstart test_bad_input 00_core 69_app 33_ppo 57_inside 38_prefer test_readme test_mesh'''.split()

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "A file is one process's work, as what its tests share is made once; of the notebooks, each is by itself."
    for item in items: item.add_marker(pytest.mark.xdist_group(item.callspec.id if item.path.stem == 'test_notebooks' else item.path.stem))
    group = lambda item: item.get_closest_marker('xdist_group').args[0]
    items.sort(key=lambda item: LONG.index(group(item)) if group(item) in LONG else len(LONG))
