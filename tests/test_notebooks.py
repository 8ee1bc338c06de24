"Each notebook runs from top to bottom, in a process of its own: nothing leaks from one to the next."
import multiprocessing, os, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/'nbs').rglob('*.ipynb'))
# The processes are forked from one that has imported what all notebooks import, and done nothing else.
fresh = multiprocessing.get_context('forkserver')
fresh.set_forkserver_preload(['jax', 'flax.nnx', 'optax', 'transformers', 'matplotlib.pyplot', 'nbdev.test'])

def run(nb: Path, log: Path):
    "Run a notebook; what it says and the exit status are left for the parent."
    with open(log, 'w') as file: os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    from nbdev.test import test_nb
    good, _ = test_nb(nb, basepath=root)
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(0 if good else 1)

@pytest.mark.parametrize('nb', notebooks, ids=lambda nb: nb.stem)
def test_notebook(nb, tmp_path, monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    process = fresh.Process(target=run, args=(nb, tmp_path/'log'))
    process.start()
    process.join(300)
    late = process.is_alive()
    if late: process.kill(); process.join()
    assert process.exitcode == 0, ('stopped after 300 seconds\n'*late + (tmp_path/'log').read_text(errors='replace'))[-4000:]
