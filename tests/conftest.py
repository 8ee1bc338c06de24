"What several tests need."
import os
import pytest

# There is much to compile here and little to compute. Child processes inherit it.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
os.environ.setdefault('XLA_FLAGS', '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1') # a quarter less time than without
# And what was compiled once is there when the tests run again: in a folder of its own that is shortened before, not by JAX,
# which reads the whole folder for each program that it keeps (half a second at six thousand, and there is a lock).
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
from rlhf_lab.runs import cache_dir
programs = cache_dir()/'programs'/'tests'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(programs))

def pytest_configure(config):
    "At most half a gigabyte of compiled programs; the oldest go."
    if hasattr(config, 'workerinput'): return
    kept = 0
    for size, file in [(f.stat().st_size, f) for f in sorted(programs.glob('*'), key=lambda f: -f.stat().st_mtime)]:
        kept += size
        if kept > 2**29: file.unlink(missing_ok=True)

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
LONG = '''test_quickstart test_app test_hosts test_regressions 45_judges 34_dpo 47_compare 35_online 30_train 44_quickstart 20_model 32_reward afternoon test_prefer
    test_cli 23_generate 33_ppo 38_prefer test_smollm2 31_sft 37_practise 57_inside test_bad_input 43_xray 39_control test_readme test_mesh'''.split()

def pytest_collection_modifyitems(items):
    place = lambda item: item.callspec.id if item.path.stem == 'test_notebooks' else item.path.stem
    items.sort(key=lambda item: LONG.index(place(item)) if place(item) in LONG else len(LONG))

def pytest_xdist_make_scheduler(config, log):
    "With several processes a file is the work of one, as what its tests share is made once; of the notebooks, each is by itself."
    from xdist.scheduler import LoadScopeScheduling
    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid): return nodeid if 'test_notebooks' in nodeid else nodeid.split('::')[0]
    config.option.loadscopereorder = False
    return Files(config, log)
