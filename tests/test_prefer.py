"Preferring from files: a reference that moves survives a restart, every kind of judgement finds its loss, no loss is a name for another."
import json, typing
import jax.numpy as jnp, numpy as np, pytest
from rlhf_lab import dpo
from rlhf_lab.core import Batch, Pairs
from rlhf_lab.data import tokenize_rows
from rlhf_lab.judgements import as_pairs, as_thumbs
from rlhf_lab.prefer import REFERENCE_FREE, DPOConfig, KTOConfig, converted, loss_of, train_dpo, train_kto
from rlhf_lab.runs import Run
from rlhf_lab.sft import prepare_rows
from rlhf_lab.tokens import load_tokenizer
from rlhf_lab.train import TrainConfig

SMALL = dict(rank=2, top_layers=1, batch_size=4, max_length=64, precision='float32', save_every=2, learning_rate=1e-2)
PAIRS = [dict(prompt=f'The film {i}', chosen=f' was a joy {i}.', rejected=f' was a bore, a bore {i}.') for i in range(24)]

def write(path, rows): path.write_text(''.join(json.dumps(row) + '\n' for row in rows)); return str(path)

@pytest.fixture
def how(tmp_path, toy): return dict(SMALL, model=toy, data=write(tmp_path/'pairs.jsonl', PAIRS))

class Killed(Exception): "The power failed."

def killed_at(monkeypatch, step):
    "The update after `step` never happens."
    log = Run.log
    def stop(run, n, measured):
        log(run, n, measured)
        if n == step: raise Killed
    monkeypatch.setattr(Run, 'log', stop)
    return lambda: monkeypatch.setattr(Run, 'log', log)

@pytest.mark.slow
@pytest.mark.parametrize('moves', [dict(ref_alpha=.6, ref_every=2), dict(chunks=2)], ids=['TR-DPO', 'sDPO'])
def test_a_moving_reference_survives_a_restart(how, tmp_path, monkeypatch, moves):
    train_dpo(DPOConfig(out=str(tmp_path/'whole'), **how, **moves))
    mend = killed_at(monkeypatch, 5)
    with pytest.raises(Killed): train_dpo(DPOConfig(out=str(tmp_path/'half'), **how, **moves))
    mend()
    train_dpo(DPOConfig(out=str(tmp_path/'half'), **how, **moves, resume=True))
    whole, half = (Run(tmp_path/name).metrics() for name in ('whole', 'half'))
    assert whole == half and len(whole) == 6
    if 'chunks' in moves: # where the reference is the policy, all is as at the start
        assert [abs(row['loss'] - np.log(2)) < 1e-5 for row in whole] == [n%3 == 0 for n in range(6)]

def test_thumbs_resume_and_balance(how, tmp_path, monkeypatch, capsys):
    votes = [dict(prompt=row['prompt'], completion=row[side], label=side == 'chosen') for row in PAIRS for side in ('chosen', 'rejected')][::2] + [
        dict(prompt='Good?', completion=' no.', label=False), dict(prompt='Bad?', completion=' no.', label=False)]
    settings = dict(how, data=write(tmp_path/'votes.jsonl', votes))
    train_kto(KTOConfig(out=str(tmp_path/'whole'), **settings))
    assert '24 liked with weight 1.00, 2 disliked with weight 9.00' in capsys.readouterr().out
    mend = killed_at(monkeypatch, 4)
    with pytest.raises(Killed): train_kto(KTOConfig(out=str(tmp_path/'half'), **settings))
    mend()
    train_kto(KTOConfig(out=str(tmp_path/'half'), **settings, resume=True))
    whole, half = (Run(tmp_path/name).metrics() for name in ('whole', 'half'))
    assert whole == half and len(whole) == 6
    assert not any(row['skipped'] for row in whole) and whole[0]['lab/kl_baseline'] == 0

@pytest.mark.parametrize('convert', [as_pairs, as_thumbs])
@pytest.mark.parametrize('kind', ['pairs', 'ratings', 'votes', 'best', 'ranks', 'verdicts'])
def test_any_judgements_will_do(how, tmp_path, capsys, convert, kind):
    rows, say = [], lambda row, **more: rows.append(dict(prompt=row['prompt'], **more))
    for n, row in enumerate(PAIRS[:8]):
        three = [row['rejected'], row['chosen'], ' was.']
        if kind == 'pairs': rows.append(row)
        elif kind in ('ratings', 'votes'):
            for text, stars in zip(three, (1, 5, 3)): say(row, completion=text, **({'rating': stars} if kind == 'ratings' else {'label': stars > 2}))
        elif kind == 'best': say(row, completions=three, best=1)
        elif kind == 'ranks': say(row, completions=three, ranks=[3, 1, 2])
        else: say(row, first=row['chosen'], second=row['rejected'], verdict=('first', 'first', 'tie', 'both good')[n%4])
    config, tokenizer = TrainConfig(**how | dict(data=write(tmp_path/'judged.jsonl', rows), holdout=0.)), load_tokenizer(how['model'])
    with Run(tmp_path/'run') as run: kept, held = prepare_rows(config, tokenizer, run, lambda rows: converted(rows, convert, 'judgements', config.data))
    said, middle, tie = capsys.readouterr().out, '16 rows, dropped 8 in the middle', '16 rows, dropped 8 tie'
    expected = dict(pairs=('8 rows', '16 rows'), ratings=('24 rows', middle), votes=(tie, '24 rows'), best=(tie, '24 rows'), ranks=('24 rows', middle),
        verdicts=('4 rows, dropped 4 tie', '12 rows, dropped 2 tie'))[kind][convert is as_thumbs]
    assert len(kept) == int(expected.split()[0]) and not held and all(('chosen' in row) == (convert is as_pairs) for row in kept)
    assert (f': {expected}' in said) if 'dropped' in expected else 'dropped' not in said
    assert tokenize_rows(kept, tokenizer, 64)

LN2 = np.log(2)
START = dict.fromkeys(['sigmoid', 'cdpo', 'robust', 'sigmoid_norm', 'forward_kl', 'js', 'alpha'], LN2) | dict(hinge=1, ipo=25, ipo_mean=25, exo=-LN2 - .5*np.log(1e-3*(1 - 1e-3)),
    nca=2*LN2, bco=2*LN2, sppo_hard=50, apo_zero=1, apo_down=1, discopop=(LN2 + 1)/2)
NAMES = typing.get_args(DPOConfig.__annotations__['loss'])

def test_each_name_is_a_loss_of_its_own(monkeypatch):
    "At the start it costs what its formula says; away from it no two agree (R9)."
    monkeypatch.setattr(dpo, 'score_tokens', lambda model, batch, temperature=1., hidden=None: (jnp.where(batch.mask, batch.below, 0), None))
    class Told:
        def hidden(self, batch): return batch.below
    rows, ends = np.random.default_rng(0), np.array([[5, 7, 4], [6, 3, 7]])
    side = lambda end: Batch(np.zeros((3, 8), int), jnp.asarray((np.arange(8) > 1) & (np.arange(8) <= end[:, None])), below=jnp.asarray(-rows.exponential(size=(3, 8)), jnp.float32))
    pairs = dpo.reference_logprobs(Told(), Pairs(side(ends[0]), side(ends[1])))
    cost = lambda name, pairs: float(np.divide(*map(float, loss_of(DPOConfig(loss=name))(Told(), pairs)[:2])))
    for name, value in START.items(): assert cost(name, pairs) == pytest.approx(value, rel=1e-5), name
    assert set(NAMES) == set(START) | set(REFERENCE_FREE)
    moved = pairs.replace(ref_chosen=pairs.ref_chosen - 1.5, ref_rejected=pairs.ref_rejected + jnp.array([.5, 2., -3.]))
    costs = sorted(cost(name, moved) for name in NAMES)
    assert np.diff(costs).min() > 1e-5 and len(costs) == 20
