"The report card: what is counted is counted right, strange pairs do not break the page, and a mistake costs one line."
import json, re
from itertools import combinations
import numpy as np, pytest
from rlhf_lab.card import page, report_card
from rlhf_lab.cli import main
from rlhf_lab.trust import best_of_means, disagreement, kinds, lean, optimisation_curve, sliced, trusted_range

random = np.random.default_rng(0)

def pair(i, **more): return dict(prompt=f'Question {i}', chosen='yes it is', rejected='no') | more

# ── what is counted ──

@pytest.mark.parametrize('n', [1, 2, 5, 8])
def test_best_of_k_is_the_mean_over_all_subsets(n):
    "The definition, subset by subset; who is tied for the best is chosen by lot."
    proxy, gold = random.integers(0, 4, (3, n))*1., random.normal(size=(3, n))
    sizes, truth, seen = best_of_means(proxy, gold)
    assert sizes == sorted({k for k in (1, 2, 4, 8) if k <= n} | {n})
    for p in range(3):
        for k, ours, theirs in zip(sizes, truth[:, p], seen[:, p]):
            best = [[i for i in subset if proxy[p, i] == max(proxy[p, list(subset)])] for subset in combinations(range(n), k)]
            assert abs(ours - np.mean([np.mean(gold[p, tied]) for tied in best])) < 1e-12
            assert abs(theirs - np.mean([proxy[p, tied[0]] for tied in best])) < 1e-12

def test_many_samples_do_not_overflow():
    proxy = random.normal(size=(2, 2000))
    sizes, truth, _ = best_of_means(proxy, proxy)
    assert sizes[-1] == 2000 and np.allclose(truth[-1], proxy.max(1)) and np.allclose(truth[0], proxy.mean(1))

def test_the_best_of_k_of_a_normal_proxy_is_its_expected_maximum():
    "Known constants: 0.5642, 1.0294 and 1.4236 for two, four and eight draws."
    proxy = random.normal(size=(800, 8))
    for row, expected in zip(optimisation_curve(proxy, proxy)[1:], (.5642, 1.0294, 1.4236)): assert row['gold'][1] < expected < row['gold'][2]

def rises(*ends): return [dict(n=2**i, kl=float(i), rise=(0, *end)) for i, end in enumerate(((0, 0), *ends))]

@pytest.mark.parametrize('ends, kl, why', [
    ([(.1, .2), (.1, .2)], 2, 'more samples were not tried'), ([(.1, .2), (-.1, .2), (.1, .2)], 1, 'beyond it no rise can be shown'),
    ([(.1, .2), (-.2, -.1)], 1, 'beyond it the true score falls'), ([(-.2, .1)], 0, 'beyond it no rise can be shown'), ([], 0, 'more samples were not tried')])
def test_the_range_of_trust_ends_with_the_last_sure_rise(ends, kl, why):
    found = trusted_range(rises(*ends))
    assert (found['kl'], found['why']) == (kl, why)

def test_heavy_tails_end_the_trust():
    "Errors of the proxy with heavier tails than the truth: the hard push finds errors (Goodhart), a proxy with light ones is trusted farther."
    gold = random.normal(size=(150, 128))
    heavy, light = (trusted_range(optimisation_curve(gold + noise, gold)) for noise in (random.standard_t(1.2, size=gold.shape), .5*random.normal(size=gold.shape)))
    assert 1 < heavy['n'] < light['n'] == 128

def test_a_lean_is_seen_from_both_sides():
    "Swapping what is called chosen changes neither the correlation nor how often the judge follows the feature."
    margins, feature = random.normal(size=(2, 200))
    margins += feature
    sign = random.choice([-1, 1], 200)
    a, b = lean(margins, feature), lean(margins*sign, feature*sign)
    both = np.corrcoef(np.concatenate([margins, -margins]), np.concatenate([feature, -feature]))[0, 1]
    assert np.allclose(a['correlation'], b['correlation']) and a['judge'] == b['judge'] and abs(a['correlation'][0] - both) < 1e-12
    assert a['excess'][0] == pytest.approx(a['judge'][0] - a['people'][0])

def test_rare_names_share_a_slice_and_few_prompts_are_marked():
    names, which = kinds(['a']*40 + [f'rare {i}' for i in range(30)], most=3)
    found = sliced(np.ones(70), names, which)
    assert [row['name'] for row in found][-1] == 'all others' and sum(row['pairs'] for row in found) == 70
    assert [row['few'] for row in sliced(np.ones(40), ['one', 'many'], np.repeat([0, 1], 20), np.r_[np.zeros(20), np.arange(20)])] == [True, False]

def test_members_are_measured_by_their_own_margins():
    members = random.normal(size=(3, 50))
    loud = members*[[1], [10], [.1]]
    assert np.allclose(disagreement(members, members[0])['here'], disagreement(loud, members[0])['here'])
    assert disagreement([[1, 1], [1, -1]], [1, 1])['flips'][0] == .5

# ── strange pairs ──

def test_a_single_pair_gets_a_card(tmp_path):
    card = report_card(tmp_path, [1.], [pair(0)])
    assert card['pairs'] == 1 and list(card['calibration']['scores']) == ['as it stands'] and (tmp_path/'card.md').exists()

def test_equal_margins_and_equal_lengths(tmp_path):
    card = report_card(tmp_path, np.zeros(30), [pair(i, rejected='no it is') for i in range(30)], proxy=np.zeros((5, 4)), gold=random.normal(size=(5, 4)))
    assert card['accuracy'][0] == .5 and set(card['leans'].values()) == {None} and card['trusted']['n'] == 1 and 'nan' not in json.dumps(card).lower()
    assert 'Only 5 prompts' in page(card)

def test_chats_count_their_turns_and_markup_stays_text(tmp_path):
    chat = [dict(role=role, content='so') for role in ('user', 'assistant', 'user')]
    rows = [pair(i, prompt=chat[-1:] if i % 2 else chat, source='<b>|x|</b>' if i % 3 else 'y $x$') for i in range(40)]
    card = report_card(tmp_path, random.normal(size=40), rows, name='a*b*')
    assert [row['name'] for row in card['slices']['turns']] == ['1', '2']
    text = (tmp_path/'card.md').read_text()
    marked = [re.sub(r'\\.', '', line) for line in text.split('\n') if r'\|x' in line]
    assert '<b>' not in text and r'a\*b\*' in text and len(marked) == 1 and marked[0].count('|') == 4 # three cells

# ── mistakes ──

@pytest.fixture(scope='module')
def place(toy, tmp_path_factory):
    import jax
    from rlhf_lab.lora import add_head
    from rlhf_lab.reward import save_judge
    from rlhf_lab.weights import load_model
    folder = tmp_path_factory.mktemp('cards')
    def write(name, *rows): (folder/f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    write('pairs', *map(pair, range(8)))
    write('single', dict(prompt='a', completion='b'))
    write('voted', pair(0, votes=['left']))
    write('unscored', dict(prompt='a', completions=['b', 'c']))
    write('ragged', dict(prompt='a', completions=['b', 'c'], gold=[1, 2]), dict(prompt='b', completions=['b', 'c', 'd'], gold=[1, 2, 3]))
    write('short', dict(prompt='a', completions=['b', 'c'], gold=[1]))
    write('words', dict(prompt='a', completions=['b', 'c'], gold=['good', 'bad']))
    model, tokenizer = load_model(toy, 'float32')
    save_judge(add_head(model, key=jax.random.key(0)), tokenizer, folder/'judge', dict(pool='last'))
    (folder/'judge/config.json').write_text(json.dumps(dict(data=str(folder/'seen.jsonl'), holdout=0, max_length=64)))
    write('seen', *map(pair, range(4)))
    (folder/'empty').mkdir()
    return folder

@pytest.mark.parametrize('code, words, flags', [
    (2, 'add --reward', '--data pairs.jsonl'), (2, 'add --data', '--reward judge'),
    (4, 'empty holds no reward model', '--reward empty --data pairs.jsonl'), (4, 'nowhere holds no reward model', '--reward nowhere --data pairs.jsonl'),
    (3, 'there is no such file', '--reward judge --data nothing.jsonl'), (3, 'single.jsonl: holds no usable pairs', '--reward judge --data single.jsonl'),
    (2, 'has seen all of it', '--reward judge --data seen.jsonl'), (2, 'train several with --members', '--reward judge --data pairs.jsonl --elsewhere pairs.jsonl'),
    (2, 'add a column gold', '--reward judge --data pairs.jsonl --samples unscored.jsonl'), (3, 'equally many', '--reward judge --data pairs.jsonl --samples ragged.jsonl'),
    (3, 'equally many', '--reward judge --data pairs.jsonl --samples pairs.jsonl'), (3, 'short.jsonl: gold', '--reward judge --data pairs.jsonl --samples short.jsonl'),
    (3, 'words.jsonl: gold', '--reward judge --data pairs.jsonl --samples words.jsonl'), (3, 'row 1: votes', '--reward judge --data voted.jsonl'),
    (2, 'without --samples', '--reward judge --data pairs.jsonl --gold judge'), (2, 'unknown flag `--sample`', '--reward judge --sample x')])
def test_a_mistake_costs_one_line(place, capfd, monkeypatch, tmp_path, code, words, flags):
    monkeypatch.chdir(place)
    got, err = main(['card', *flags.split(), '--out', str(tmp_path), '--precision', 'float32']), capfd.readouterr().err
    assert (got, err.count('\n')) == (code, 1) and err.startswith('error: ') and words in err, err

def test_a_card_is_not_overwritten_unless_told(place, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    args = ['card', '--reward', 'judge', '--data', 'pairs.jsonl', '--out', str(tmp_path/'card'), '--precision', 'float32']
    assert main(args) == 0 and re.search(r'right about .* of 8 pairs from 8 prompts', capfd.readouterr().out)
    assert main(args) == 1 and 'already holds a run' in capfd.readouterr().err
    assert main([*args, '--resume']) == 0
