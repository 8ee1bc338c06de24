"Each notebook runs from top to bottom, in a process of its own: nothing leaks from one to the next."
import os, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/'nbs').rglob('*.ipynb'))

@pytest.mark.parametrize('nb', notebooks, ids=lambda nb: nb.stem)
def test_notebook(nb):
    command = [Path(sys.executable).with_name('nbdev-test'), nb.relative_to(root)]
    done = subprocess.run(command, cwd=root, env=os.environ | {'MPLBACKEND': 'Agg'}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
