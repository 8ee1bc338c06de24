"Data sets out of the store: true to the byte, loadable by others, complete in their accounts; and back in again."
import csv, hashlib, json
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from rlhf_lab.core import DataError
from rlhf_lab.exports import freeze, neutral, original, write_csv
from rlhf_lab.feedback import Feedback
from rlhf_lab.forms import EXACT, FORMATS
from rlhf_lab.imports import import_rows

ODD = 'a\0b 🎬\r\n<script> "q" \u2028 é e\u0301 '

@pytest.fixture
def store(tmp_path):
    store = Feedback(tmp_path/'votes.db')
    yield store
    store.close()

def filled(store, chat: bool, system: bool = True):
    "Every kind of judgement, by three people."
    people = [store.session(name) for name in ('ann', 'bob', 'eve')]
    for n, end in enumerate((ODD, 'fine', '2020-01-01')):
        prompt = [*[dict(role='system', content='Be kind.')]*system, dict(role='user', content=f'Question {n}?{ODD}')] if chat else f'Question {n}?\n'
        a, b, c = (store.record(prompt, f' {word} {end}', model=word) for word in ('one', 'two', 'three'))
        for who, choice in zip(people, ('a', 'b', 'a')): store.judge('pair', [a, b], {'value': choice}, session=who, ui={'latency_ms': 9000, 'blind': False})
        store.judge('pair', [b, c], {'value': ('both_good', 'both_bad', 'b')[n]}, session=people[0])
        store.judge('rank', [a, b, c], {'ranks': [2, 1, 2]}, session=people[1])
        store.judge('edit', [c], {'completion': f' better {end}'}, session=people[2])
        store.judge('rating', [b], {'clarity': 4, 'tone': 2}, session=people[0]); store.judge('rating', [c], {'clarity': 1}, session=people[0])
        store.vote(a, 'up'); store.vote(b, 'down')

def lines(version, name): return [json.loads(line) for line in (version.folder/'data'/f'{name}.jsonl').read_text(encoding='utf-8').split('\n')[:-1]]

TRL = dict(preference={'prompt', 'chosen', 'rejected'}, implicit={'chosen', 'rejected'}, unpaired={'prompt', 'completion', 'label'},
    ranked={'prompt', 'completions', 'ranks'}, sft={'prompt', 'completion'}, prompts={'prompt'}, hh={'chosen', 'rejected'},
    arena={'question_id', 'model_a', 'model_b', 'winner', 'judge', 'conversation_a', 'conversation_b', 'turn', 'anony', 'language', 'tstamp'})

@pytest.mark.parametrize('chat', [True, False])
def test_every_form_is_true_to_the_byte_and_loads(store, tmp_path, chat):
    from datasets import load_dataset
    filled(store, chat)
    version = freeze(store, tmp_path/'sets', tuple(FORMATS), split='all')
    assert all(version.counts.values())
    kept = {row['completion'] for row in store.read('SELECT completion FROM generation')} | {f' better {end}' for end in (ODD, 'fine', '2020-01-01')}
    for name in FORMATS:
        rows, columns = lines(version, name), TRL[name]
        loaded = load_dataset(str(version.folder), name, split='train', cache_dir=str(tmp_path/'cache'))
        assert set(loaded.column_names) == columns
        assert list(loaded) == [{c: row[c] for c in loaded.column_names} for row in rows] # Parquet and JSON lines say the same
        assert {c for row in rows for c in row} - columns == set() or name not in EXACT
        for row in rows:
            for column in {'chosen', 'rejected', 'completion'} & columns if name not in ('implicit', 'hh') else ():
                assert (row[column][0]['content'] if chat else row[column]) in kept
    for row in lines(version, 'preference'): assert set(row) - TRL['preference'] == {'meta_n', 'meta_weight', 'meta_agreement', 'meta_models', 'meta_events'}
    if chat: assert [(row['chosen'][:-1], row['chosen'][-1:]) for row in lines(version, 'implicit')] == [(row['prompt'], row['chosen']) for row in lines(version, 'preference')]

def test_json_lines_load_offline_too(store, tmp_path):
    from datasets import load_dataset
    filled(store, True)
    version = freeze(store, tmp_path/'sets', ('preference',), split='all')
    loaded = load_dataset('json', data_files=str(version.folder/'data'/'preference.jsonl'), split='train', cache_dir=str(tmp_path/'cache'))
    assert [row['chosen'][0]['content'] for row in loaded] == [row['chosen'][0]['content'] for row in lines(version, 'preference')]

def test_the_accounts_add_up(store, tmp_path):
    filled(store, True)
    ask = lambda text, **how: store.record('Another question', text, model='one', **how)
    eve = store.session('eve', scope=('store',))
    a, b, same, empty, wrong, quick, partial, held = *map(ask, ('x', 'y', ' x', '')), ask('z', more=dict(error='it broke')), ask('w '*99), ask('v'), ask('u')
    store.vote(a, 'up', session=eve)
    store.judge('pair', [a, same], {'value': 'a'}); store.vote(empty, 'down'); store.vote(wrong, 'up'); store.judge('skip', [a, b], {})
    store.judge('thumb', [quick], {'value': 'up'}, ui={'latency_ms': 100}); store.judge('thumb', [partial], {'value': 'up'}, ui={'partial': True})
    store.judge('pair', [b, held], {'value': 'a'}, ui={'blind': True}); store.judge('moderate', [b], {'action': 'quarantine'})
    store.vote(held, 'up'); store.vote(held, 'none')
    hint = store.record('Who?', 'I am One, made by one.', model='one')
    store.judge('thumb', [hint], {'value': 'up'}, ui={'blind': True})
    version = freeze(store, tmp_path/'sets', ('preference', 'unpaired'), split='all', evaluation=['Another  question '])
    assert version.excluded['evaluation overlap'] == 5 and version.excluded['leaked identity'] == 1
    version = freeze(store, tmp_path/'sets', ('preference', 'unpaired'), split='all', cap=9)
    expected = {'withdrawn': 1, 'no train consent': 1, 'skipped': 1, 'moderated': 1, 'partial': 1, 'error': 1, 'empty': 1, 'identical': 1, 'leaked identity': 1, 'too fast': 1}
    assert expected.items() <= version.excluded.items()
    facts = json.loads((version.folder/'MANIFEST.json').read_text())
    assert facts['used'] + sum(facts['excluded'].values()) == facts['judgements'] == 30 + 10 and facts['excluded'] == version.excluded
    assert version.unknown['too fast'] > 0 and 'too fast: unknown, kept' in (version.folder/'README.md').read_text()
    for name, digest in facts['files'].items(): assert hashlib.sha256((version.folder/name).read_bytes()).hexdigest() == digest
    assert set(facts['files']) == {str(f.relative_to(version.folder)) for f in version.folder.rglob('*') if f.is_file()} - {'MANIFEST.json'}
    for reason, n in version.excluded.items(): assert f'| {reason} | {n} |' in (version.folder/'README.md').read_text()
    rows = store.read('SELECT DISTINCT event_id FROM dataset_row WHERE dataset_version = :id', id=version.id)
    assert len(rows) == facts['used'] and facts['parent'] == 'fb-v1-' + facts['parent'][6:]

def test_people_who_fail_gold_items_do_not_teach(store, tmp_path):
    from rlhf_lab.asking import add_item
    good, bad = store.session('good'), store.session('bad')
    for n in range(4):
        pair = [store.record(f'Q {n}', text, model='base') for text in ('right', 'wrong')]
        if n < 3: add_item(store, 'pair', pair, gold={'value': 'a'})
        store.judge('pair', pair, {'value': 'a'}, session=good); store.judge('pair', pair, {'value': 'b'}, session=bad)
    version = freeze(store, tmp_path, split='all')
    assert version.excluded == {'failed gold items': 4} and [row['meta_agreement'] for row in lines(version, 'preference')] == [1.]*4

def test_a_filter_that_takes_everything_is_an_alarm(store, tmp_path):
    "D10"
    for n in range(3): store.judge('thumb', [store.record(f'{n}', 'x', model='base')], {'value': 'up'}, ui={'latency_ms': 1})
    with pytest.raises(DataError, match=r'alarm: all of 3 judgements were left out \(3 too fast\): nothing was frozen'): freeze(store, tmp_path/'sets', ('unpaired',), split='all')
    assert not (tmp_path/'sets').exists() and store.read('SELECT * FROM dataset_version') == []
    store.judge('thumb', [store.record('4', 'x', model='base')], {'value': 'up'}) # nobody measured: unknown, and kept
    version = freeze(store, tmp_path/'sets', ('unpaired',), split='all')
    assert (version.counts, version.excluded, version.unknown) == ({'unpaired': 1}, {'too fast': 3}, {'too fast': 1})

def test_splits_never_meet(store, tmp_path):
    for n in range(60): store.vote(store.record(f'Question {n}', 'x', model='base'), 'up')
    train, held = (freeze(store, tmp_path, ('unpaired',), split=name) for name in ('train', 'validation'))
    assert train.counts['unpaired'] + held.counts['unpaired'] == 60 and train.excluded == {'other split': held.counts['unpaired']}
    assert not {row['prompt'] for row in lines(train, 'unpaired')} & {row['prompt'] for row in lines(held, 'unpaired')}

def test_chats_and_texts_are_frozen_apart(store, tmp_path):
    filled(store, True); filled(store, False)
    with pytest.raises(DataError, match='form=text and form=chat'): freeze(store, tmp_path, split='all')
    both = [freeze(store, tmp_path, split='all', form=form).counts['preference'] for form in ('chat', 'text')]
    assert both[0] == both[1] > 0

@pytest.mark.parametrize('name', sorted(set(FORMATS) - {'prompts'}))
def test_an_export_that_is_imported_exports_the_same(store, tmp_path, name):
    "B3: texts and rows survive the round trip."
    filled(store, name != 'sft', system=name != 'hh')
    version = freeze(store, tmp_path/'sets', (name,), split='all')
    other = Feedback(tmp_path/'other.db')
    counts = import_rows(other, str(version.folder/'data'/f'{name}.jsonl'))
    assert counts['judgements'] == version.counts[name] and set(counts) == {'judgements'}
    again = freeze(other, tmp_path/'sets', (name,), split='all')
    strip = lambda row: {k: v for k, v in row.items() if not k.startswith('meta_') and k not in ('question_id', 'tstamp', 'judge', 'anony', 'language')}
    rows = [[json.dumps(strip(row), sort_keys=True, ensure_ascii=False) for row in lines(v, name)] for v in (version, again)]
    if name == 'hh': rows = [[''.join(row.replace('\\r', ' ').replace('\\n', ' ').split()) for row in part] for part in rows] # that form trims its turns
    assert sorted(rows[0]) == sorted(rows[1])
    assert import_rows(other, str(version.folder/'data'/f'{name}.jsonl')) == {'known before': version.counts[name]}
    other.close()

def test_a_torn_last_line_is_counted(store, tmp_path):
    "D7"
    rows = [json.dumps(dict(prompt=f'Q {n}', completion='x', label=True)) for n in range(5)]
    (file := tmp_path/'rows.jsonl').write_text('\n'.join(rows)[:-7])
    assert import_rows(store, str(file)) == {'judgements': 4, 'torn last line': 1} and len(store.votes()) == 4
    file.write_text('\n'.join(rows).replace('"Q 2"', '"Q'))
    with pytest.raises(DataError, match=r'rows.jsonl:3: '): import_rows(store, str(file))

def test_ratings_choices_and_arena_logs_come_in(store, tmp_path):
    def load(name, rows):
        (file := tmp_path/name).write_text(''.join(json.dumps(row) + '\n' for row in rows))
        return import_rows(store, str(file))
    said = lambda text: [dict(role='user', content='Hi'), dict(role='assistant', content=text)]
    assert load('stars.jsonl', [dict(prompt='Q', completion=text, rating=n) for text, n in (('a', 5), ('b', 2), ('b', 'x'))]) == {'judgements': 2, 'malformed': 1}
    assert load('best.jsonl', [dict(prompt='Q', completions=['a', 'b', 'c'], best=2)]) == {'judgements': 1}
    battle = dict(model_a='x', model_b='y', winner='model_b', judge='ann', conversation_a=said('a'), conversation_b=said('b'))
    assert load('arena.jsonl', [battle, dict(battle, judge='bob', winner='tie (bothbad)'), dict(battle, winner='?')]) == {'judgements': 2, 'malformed': 1}
    version = freeze(store, tmp_path/'sets', ('arena',), split='all', kinds=('pair',))
    assert [(row['model_a'], row['winner']) for row in lines(version, 'arena')] == [('x', 'model_b'), ('x', 'tie (bothbad)')]
    assert len({row['judge'] for row in lines(version, 'arena')}) == 2
    assert freeze(store, tmp_path/'sets', ('preference',), split='all', form='text').counts['preference'] == 3

@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from('=+-@＝＋－＠\t\r\n"\' ‘a1'), max_size=6) | st.text(max_size=9))
def test_cells_are_neutral_and_can_be_turned_back(text):
    "E2"
    cell = neutral(text)
    assert original(cell) == text
    assert not cell.strip(' "\'‘’“”\t\r\n')[:1] in tuple('=+-@＝＋－＠') or cell.startswith("'")
    assert not cell[:1] in tuple('\t\r\n=+-@＝＋－＠')

def test_a_csv_is_a_view(tmp_path):
    rows = [dict(prompt='=1+1', chosen=[dict(role='user', content='x')], label=True), dict(prompt='fine\n"', chosen=[], label=False)]
    with open(write_csv(tmp_path/'x.csv', rows), encoding='utf-8', newline='') as file: back = list(csv.DictReader(file))
    assert [original(row['prompt']) for row in back] == ['=1+1', 'fine\n"'] and back[0]['prompt'] == "'=1+1"
