"What README promises: its Python runs as it stands, its verbs, flags and targets exist, its table is that of the run."
import json, re
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
readme = (root/'README.md').read_text(encoding='utf-8')
makefile = (root/'Makefile').read_text(encoding='utf-8')
targets = set(re.findall(r'^([a-z-]+):.*##', makefile, re.M))

fenced = re.findall(r'^```(\w*)\n(.*?)^```$', readme, re.M | re.S)

def blocks(language: str) -> list[str]: return [text for name, text in fenced if name == language]

def test_the_python_runs_as_it_stands_on_another_model(toy, tmp_path, monkeypatch, capsys):
    code, = blocks('python')
    named = re.search(r"^name = '.*?'", code, re.M)
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(compile(code.replace(named[0], f'name = {toy!r}'), 'README.md', 'exec'), space)
    margins = [float(line) for line in capsys.readouterr().out.split('\n')[:10]]
    assert abs(margins[0]) < 1e-5 and margins == sorted(margins), 'DPO moves the margin from 0 upwards'
    rollout, mask = space['rollout'], space['rollout'].mask
    found = space['token_logprobs'](space['policy'](rollout.tokens), rollout.tokens)
    assert abs(found - rollout.logprobs)[mask].max() < 1e-4, 'what was sampled is what is scored'
    again, _ = space['load_model']('runs/mine')
    assert (again(rollout.tokens) == space['policy'](rollout.tokens)).all()

def test_the_names_that_stay_are_where_readme_says():
    from rlhf_lab import core, dpo, generate, ppo, reward, sft, train, weights
    places = {core: 'token_logprobs', dpo: 'dpo_loss', generate: 'generate', ppo: 'ppo_loss', reward: 'reward_loss',
              sft: 'sft_loss', train: 'fit'}
    for module, name in (*places.items(), (weights, 'load_model'), (weights, 'save_model')):
        assert callable(getattr(module, name)) and name in readme and module.__name__ in readme

def test_every_target_exists_and_is_named():
    assert set(re.findall(r'(?:^|`)make ([a-z-]+)', readme, re.M)) <= targets
    assert targets - {'help', 'constraints', 'clean'} <= set(re.findall(r'make ([a-z-]+)', readme))

@pytest.mark.parametrize('target, command', re.findall(r'^\| `make ([a-z-]+)` \| `\.venv/bin/([^`]+)`', readme, re.M))
def test_the_same_by_hand_is_the_same(target, command):
    recipe = re.search(rf'^{target}:.*\n((?:\t.*\n)+)', makefile, re.M)[1].replace('$(BIN)/', '').replace('$$name', 'layers')
    assert command in recipe

def test_every_verb_exists_and_is_named_with_flags_that_it_has():
    from rlhf_lab.cli import find, verbs
    from rlhf_lab.config import given
    used = [line.split('#')[0].split()[1:] for block in blocks('sh') for line in block.split('\n') if line.startswith('rlhf-lab ')]
    for words in used:
        verb = next(name for name in (' '.join(words[:2]), words[0]) if name in verbs)
        given(words[len(verb.split()):], find(verbs[verb].config))
    assert not {name for name in verbs if not re.search(rf'rlhf-lab {name}\b|`{name}`', readme)}

def test_the_tree_is_the_tree():
    tree = next(block for block in blocks('') if block.startswith('nbs/'))
    told = re.findall(r'^ *(\S+) {2,}\S', tree, re.M)
    assert all((root/name).exists() or (root/'nbs'/f'{name}.ipynb').exists() for name in told)
    assert {nb.stem for nb in (root/'nbs').glob('[0-9]*.ipynb')} == {name for name in told if name[0].isdigit()}

def test_links_lead_somewhere():
    for link in re.findall(r'\]\(([^)#:]+)\)', readme): assert (root/link).exists(), link

def test_the_table_is_that_of_the_run():
    from rlhf_lab.evaluate import table_markdown
    shown = root/'docs/quickstart'
    run = json.loads((shown/'run.json').read_text(encoding='utf-8'))
    table = table_markdown(json.loads((shown/'table.json').read_text(encoding='utf-8')))
    for part in (table, run['command'], run['commit'], run['about']): assert part in readme, 'run make readme'
    assert table in (shown/'report.md').read_text(encoding='utf-8')
