"The whole story on a toy model, from one command: every stage leaves what it should, and the table has its columns."
import json, os, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
KEYS = set('model gold_mean gold_low gold_high reward_mean win_rate win_low win_high kl length distinct_2 perplexity seconds peak_mb'.split())

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished `rlhf-lab quickstart --tiny`."
    folder = tmp_path_factory.mktemp('quickstart')/'run'
    env = dict(os.environ, PYTHONPATH=str(root), HF_HUB_OFFLINE='1')
    done = subprocess.run([sys.executable, '-c', 'import sys; from rlhf_lab.cli import main; sys.exit(main())', 'quickstart', '--tiny',
        '--out', str(folder)], env=env, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout

def test_the_table_has_a_row_for_each_model_and_all_columns(run):
    rows = json.loads((run[0]/'table.json').read_text())
    assert [row['model'] for row in rows][:4] == ['base', 'sft', 'ppo', 'dpo']
    assert {'best-of-4', 'longest-of-4', 'random-of-4'} <= {row['model'] for row in rows}
    for row in rows:
        assert KEYS <= set(row)
        assert row['gold_low'] <= row['gold_mean'] <= row['gold_high'] and row['win_low'] <= row['win_rate'] <= row['win_high']

def test_the_reference_is_at_distance_zero_and_the_trained_have_moved(run):
    rows = {row['model']: row for row in json.loads((run[0]/'table.json').read_text())}
    assert rows['sft']['kl'] == 0 and rows['sft']['win_rate'] == .5
    assert rows['ppo']['kl'] > .01 and rows['dpo']['kl'] > .01

def test_every_stage_leaves_a_model_its_metrics_and_the_report(run):
    folder, printed = run
    for stage in ('sft', 'reward', 'ppo', 'dpo'):
        assert (folder/stage/'model'/'model.safetensors').stat().st_size > 0
        assert (folder/stage/'metrics.jsonl').read_text().count('\n') > 1
        assert (folder/stage/'config.json').exists()
    for name in ('report.md', 'frontier.png', 'stages.json'): assert (folder/name).stat().st_size > 0
    assert '| ppo |' in printed and 'report.md' in printed
