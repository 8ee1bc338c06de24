"The benchmarks run, on a toy."
import json, os, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent

@pytest.mark.slow
@pytest.mark.parametrize('name', ['layers', 'generate', 'train', 'serve', 'switches'])
def test_a_benchmark_tells_each_measurement_and_a_table(name):
    done = subprocess.run([sys.executable, root/'bench'/f'{name}.py', '--tiny', '--repeats', '2'], cwd=root, capture_output=True, text=True,
                          env=os.environ | {'PYTHONPATH': str(root)}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.split('\n') if line.startswith('{')]
    assert rows and all(row['ms_min'] <= row['ms'] <= row['ms_max'] for row in rows)
    assert done.stdout.count('\n|') == len(rows) + 2
