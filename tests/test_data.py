"Each broken file gives a line and a fix, all ways to write a pair mean the same, and batches repeat exactly."
import gzip, json, random
import numpy as np, pytest
from rlhf_lab.core import CheckpointError, DataError, Pairs
from rlhf_lab.data import (Batches, Example, check_source, clean_rows, clean_text, load_rows,
    normalise_rows, prompt_texts, report, show_rows, split_rows, tokenize_rows)
from rlhf_lab.rows import check_rows
from rlhf_lab.tokens import check_mask, train_tokenizer

datasets = pytest.importorskip('datasets')
datasets.disable_progress_bars()
user, said = (lambda text: dict(role='user', content=text)), (lambda text: dict(role='assistant', content=text))

@pytest.fixture(scope='module')
def tokenizer(): return train_tokenizer(['The sky is blue, and the film was a delight.']*3, 350)

# ── formats

blue = dict(prompt=[user('The sky is')], chosen='blue', rejected='green')
PAIRS = dict(
    explicit=dict(prompt=[user('The sky is')], chosen=[said('blue')], rejected=[said('green')]),
    implicit=dict(chosen=[user('The sky is'), said('blue')], rejected=[user('The sky is'), said('green')]),
    twice=dict(prompt=[user('The sky is')], chosen=[user('The sky is'), said('blue')],
        rejected=[user('The sky is'), said('green')]),
    ultrafeedback=dict(prompt='The sky is', chosen=[user('The sky is'), said('blue')],
        rejected=[user('The sky is'), said('green')]),
    half=dict(prompt='The sky is', chosen=[said('blue')], rejected=[said('green')]),
    normal=blue,
    hh=dict(chosen='\n\nHuman: The sky is\n\nAssistant: blue', rejected='\n\nHuman: The sky is\n\nAssistant: green'),
    hh_prompt=dict(prompt='\n\nHuman: The sky is\n\nAssistant:', chosen='blue', rejected='green'))

@pytest.mark.parametrize('name', PAIRS)
def test_every_way_to_write_a_pair(name): assert normalise_rows([PAIRS[name]]) == [blue]

def test_the_other_types():
    normal = lambda **row: normalise_rows([row])[0]
    assert normal(prompt='The sky is', completion=' blue') == dict(prompt='The sky is', completion=' blue')
    assert normal(messages=[user('Hi'), said('Ho'), user('He'), said('Ha')]) == dict(prompt=[user('Hi'), said('Ho'),
        user('He')], completion='Ha')
    assert normal(prompt='Hi', completion=[said('Ho')], label=True) == dict(prompt=[user('Hi')], completion='Ho',
        label=True)
    assert normal(prompt=[user('Hi')], completion='Ho', label=0.)['label'] is False
    assert normal(text='Once') == dict(prompt='', completion='Once')
    assert normal(text='\n\nHuman: Hi\n\nAssistant: Ho') == dict(prompt=[user('Hi')], completion='Ho')
    assert normal(prompt='Hi', completions=['a', 'b', 'c'], ranks=[3, 1, 2])['ranks'] == [3, 1, 2]
    assert normal(prompt='Hi') == dict(prompt='Hi')
    assert normal(prompt=[dict(role='system', content='Be kind'), user('Hi')])['prompt'][0]['role'] == 'system'
    assert normal(chosen='The sky is blue.', rejected='The sky is green.') == dict(prompt='The sky is',
        chosen=' blue.', rejected=' green.')
    assert normal(prompt='Hi', completion='Ho', score=3) == dict(prompt='Hi', completion='Ho', score=3)

@pytest.mark.parametrize('row', [*PAIRS.values(), dict(prompt='a', completions=['b', 'c']),
    dict(messages=[user('a'), said('b')]), dict(text='a b'),
    dict(prompt='a', completion='b', label=False), dict(prompt=[user('a')])])
def test_the_normal_form_is_stable(row):
    once = normalise_rows([row])
    assert normalise_rows(once) == once and normalise_rows(datasets.Dataset.from_list(once)) == once

def test_speaking_twice_in_a_transcript():
    row = dict(chosen='\n\nHuman: a\n\nHuman: b\n\nAssistant: c', rejected='\n\nHuman: a\n\nHuman: b\n\nAssistant: d')
    assert normalise_rows([row]) == [dict(prompt=[user('a\n\nb')], chosen='c', rejected='d')]

# ── broken rows and broken files (B1)

GOOD = '{"prompt": "Hi", "completion": "Ho"}'
line = lambda **row: json.dumps(row)
LINES = dict( # Third lines that cannot be used
    comma='{"prompt": "Hi",}', half='{"prompt": "Hi', single="{'prompt': 1}", bare='Hi', array='["Hi", "Ho"]',
        number='3', null='null', word='"x"',
    two='{"prompt": "a", "completion": "b"} {"prompt": "c"}', nan='{"prompt": NaN, "completion": "b"}',
        infinity='{"prompt": "a", "completion": "b", "x": -Infinity}',
    twins='{"prompt": "a", "prompt": "b", "completion": "c"}', surrogate='{"prompt": "\\ud800", "completion": "b"}',
        raw_nul='{"prompt": "a\x00", "completion": "b"}',
    raw_tab='{"prompt": "a\tb", "completion": "b"}', deep='{"prompt": ' + '['*10_000 + ']'*10_000 + '}',
        deep_open='['*10_000, fairly_deep='{"prompt": "a", "completion": "b", "x": ' + '['*40 + ']'*40 + '}',
    missing='{"prompt": "Hi"}', nulled='{"prompt": "Hi", "completion": null}',
        numeric='{"prompt": "Hi", "completion": 3}', boolean='{"prompt": true, "completion": "x"}',
    object='{"prompt": {"role": "user"}, "completion": "x"}',
        mixed='{"prompt": [{"role": "user", "content": "Hi"}], "completion": "Ho"}', empty_object='{}',
    other_columns='{"question": "Hi", "answer": "Ho"}', invalid_utf8=b'{"prompt": "\xff\xfe", "completion": "b"}',
        utf16='{"prompt": "a"}'.encode('utf-16'))

@pytest.mark.parametrize('name', LINES)
def test_a_bad_line_is_named(tmp_path, name):
    bad = LINES[name] if isinstance(LINES[name], bytes) else LINES[name].encode()
    (file := tmp_path/'rows.jsonl').write_bytes(GOOD.encode() + b'\n\n' + bad + b'\n' + GOOD.encode())
    with pytest.raises(DataError, match=r'rows\.jsonl:3: .+: .+') as error: check_source(str(file))
    assert 'Traceback' not in str(error.value) and len(str(error.value)) < 1500

chat = lambda *messages: dict(messages=list(messages))
ROWS = dict( # A type whose first row is good, its second row bad, and the column to blame
    role=(chat(user('a'), said('b')), chat(dict(role='admin', content='a'), said('b')), 'messages'),
    control_role=(chat(user('a'), said('b')), chat(dict(role='<|im_start|>system', content='a'), said('b')),
        'messages'),
    order=(chat(user('a'), said('b')), chat(said('a'), user('b')), 'messages'),
    user_last=(chat(user('a'), said('b')), chat(user('a')), 'messages'),
    only_system=(chat(user('a'), said('b')), chat(dict(role='system', content='a'), said('b')), 'prompt'),
    late_system=(chat(user('a'), said('b')), chat(user('a'), dict(role='system', content='a'), said('b')), 'prompt'),
    twice=(chat(user('a'), said('b')), chat(user('a'), user('a'), said('b')), 'prompt'),
    starts_assistant=(chat(user('a'), said('b')), chat(said('x'), user('a'), said('b')), 'prompt'),
    only_assistant=(chat(user('a'), said('b')), chat(said('b')), 'prompt'),
    no_messages=(chat(user('a'), said('b')), dict(messages=[]), 'messages'),
    no_content=(chat(user('a'), said('b')), chat(dict(role='user', content=None), said('b')), 'messages'),
    no_role=(chat(user('a'), said('b')), chat(dict(role=None, content='a'), said('b')), 'messages'),
    label_text=(dict(prompt='a', completion='b', label=True), dict(prompt='a', completion='b', label='true'), 'label'),
    label_null=(dict(prompt='a', completion='b', label=True), dict(prompt='a', completion='b', label=None), 'label'),
    label_many=(dict(prompt='a', completion='b', label=1), dict(prompt='a', completion='b', label=3), 'label'),
    no_rejected=(blue, dict(prompt=[user('a')], chosen='b'), 'rejected'),
    nothing_shared=(dict(chosen='The sky is blue', rejected='The sky is red'), dict(chosen='One', rejected='Two'),
        'prompt'),
    other_dialogue=(PAIRS['implicit'], dict(chosen=[user('a'), said('b')], rejected=[user('c'), said('d')]),
        'rejected'),
    transcript=(PAIRS['hh'], dict(chosen='\n\nHuman: a\n\nAssistant: b',
        rejected='\n\nHuman: a\n\nAssistant: b\n\nHuman: c'), 'rejected'),
    half_transcript=(PAIRS['hh'], dict(chosen='\n\nHuman: a\n\nAssistant: b', rejected='b'), 'rejected'),
    one_completion=(dict(prompt='a', completions=['b', 'c']), dict(prompt='a', completions=['b']), 'completions'),
    ranks_short=(dict(prompt='a', completions=['b', 'c'], ranks=[1, 2]),
        dict(prompt='a', completions=['b', 'c'], ranks=[1]), 'ranks'),
    ranks_null=(dict(prompt='a', completions=['b', 'c'], ranks=[1, 2]),
        dict(prompt='a', completions=['b', 'c'], ranks=[1, None]), 'ranks'),
    prompt_system=(dict(prompt=[user('a')]), dict(prompt=[dict(role='system', content='a')]), 'prompt'),
    prompt_answered=(dict(prompt=[user('a')]), dict(prompt=[user('a'), said('b')]), 'prompt'))

@pytest.mark.parametrize('name', ROWS)
def test_a_bad_row_is_named(tmp_path, name):
    good, bad, column = ROWS[name]
    problem, = check_rows([good, bad])
    assert (problem.line, problem.column) == (2, column) and problem.message and problem.fix
    (file := tmp_path/'rows.jsonl').write_text(f'{json.dumps(good)}\n{json.dumps(bad)}\n')
    with pytest.raises(DataError, match=r'rows\.jsonl:2: '): check_source(str(file))

ACCEPTED = dict( # Odd, and fine: what is kept of two rows
    bom=(b'\xef\xbb\xbf' + GOOD.encode() + b'\n' + line(prompt='a', completion='b').encode(), 2),
    crlf=(GOOD.encode() + b'\r\n' + line(prompt='a', completion='b').encode() + b'\r\n', 2),
    no_last_newline=(GOOD.encode(), 1),
    empty_lines=(b'\n\n' + GOOD.encode() + b'\n  \n', 1),
    escaped_nul=(b'{"prompt": "a\\u0000", "completion": "b"}', 1),
    long_line=(line(prompt='a', completion='b '*500_000).encode(), 1),
    emoji=(b'{"prompt": "\\ud83d\\ude48", "completion": "b"}', 1),
    extra_columns=(GOOD.encode() + b'\n{"prompt": "a", "completion": "b", "meta": {"x": [1]}}', 2),
    mixed_extra=(b'{"prompt": "a", "completion": "b", "meta": 1}\n{"prompt": "a", "completion": "c", "meta": "x"}', 2),
    empty_text=(GOOD.encode() + b'\n' + line(prompt='a', completion=' ').encode(), 1),
    twice=(GOOD.encode() + b'\n' + GOOD.encode(), 1),
    same=(line(prompt='a', chosen='b', rejected='b').encode() + b'\n' + line(prompt='a', chosen='b',
        rejected='c').encode(), 1),
    control=(line(prompt='<|im_end|>', completion='<|im_start|>system').encode(), 1))

@pytest.mark.parametrize('name', ACCEPTED)
def test_odd_files_are_read(tmp_path, name, tokenizer):
    data, usable = ACCEPTED[name]
    (file := tmp_path/'rows.jsonl').write_bytes(data)
    assert f'| usable | {usable} |' in check_source(str(file))
    kept, _ = clean_rows(load_rows(str(file)))
    if name != 'long_line': tokenize_rows(kept, tokenizer)

@pytest.mark.parametrize('name, data, match', [
    ('none.jsonl', None, 'no such file'), ('zero.jsonl', b'', 'no rows'), ('zero.json', b'[]', 'no rows'),
        ('rows.json', b'[{"prompt": "a"},]', 'rows.json'),
    ('rows.jsonl.gz', b'not gzip', 'cannot be read'), ('cut.jsonl.gz', gzip.compress(GOOD.encode()*99, mtime=0)[:-20],
        'cannot be read'), ('rows.parquet', b'PAR1', 'cannot be loaded'),
    ('rows.csv', b'', 'cannot be loaded'), ('rows.txt', b'Hi', 'files of one kind'),
        ('columns.jsonl', b'{"question": "a", "answer": "b"}', 'rename answer to completion'),
    ('typo.jsonl', b'{"promt": "a", "chosn": "b", "rejectd": "c"}', 'chosn to chosen')])
def test_whole_files(tmp_path, name, data, match):
    file = tmp_path/name
    if data is not None: file.write_bytes(data)
    with pytest.raises(DataError, match=match) as error: check_source(str(file))
    assert name in str(error.value)

def test_five_problems_and_a_count(tmp_path):
    (file := tmp_path/'rows.jsonl').write_text(GOOD + '\n{"prompt": "a"}'*9)
    with pytest.raises(DataError) as error: check_source(str(file))
    assert len(str(error.value).splitlines()) == 6 and '4 more' in str(error.value)

def test_no_traceback_whatever_the_file(tmp_path):
    "B2: 600 random rows and 400 files with random bytes changed; everything is read or refused in words."
    rng = random.Random(0)
    texts = ['', ' ', 'Hi', '\n\nHuman: a\n\nAssistant: b', '\n\nHuman:', '\n\nAssistant: x', '<|im_end|>', '\ud800',
        '\x00']
    def value(depth=0):
        pick = rng.randrange(8 if depth < 3 else 5)
        if pick == 5: return [value(depth + 1) for _ in range(rng.randrange(3))]
        if pick == 6: return {k: value(depth + 1) for k in rng.sample(['role', 'content', 'x'], rng.randrange(3))}
        if pick == 7:
            return [dict(role=rng.choice(['user', 'assistant', 'system', 'admin']),
                content=rng.choice(texts)) for _ in range(rng.randrange(4))]
        return [rng.choice(texts), rng.choice(texts), None, rng.random() < .5, rng.choice([1, 2.5, 10**30])][pick]
    columns = ['prompt', 'completion', 'chosen', 'rejected', 'label', 'messages', 'text', 'completions', 'ranks',
        'other']
    for _ in range(600):
        rows = [{c: value() for c in rng.sample(columns, rng.randrange(5))} for _ in range(rng.randrange(4))]
        problems = check_rows(rows)
        assert all(p.line >= 1 and p.message and p.fix for p in problems)
        if not problems: split_rows(rows); report(rows); clean_rows(rows)
    file = tmp_path/'rows.jsonl'
    good = '\n'.join(json.dumps(row) for row in (PAIRS['hh'], PAIRS['hh'])).encode()
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)): data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)
        try: check_source(str(file))
        except DataError as e: assert 'rows.jsonl' in str(e)

# ── sources

def test_every_kind_of_file_and_folder(tmp_path):
    rows = [dict(prompt=f'q {n}', completion=f'a {n}') for n in range(3)]
    table, lines = datasets.Dataset.from_list(rows), '\n'.join(map(json.dumps, rows))
    files = {'a.jsonl': lines.encode(), 'a.json': json.dumps(rows).encode(), 'lines.json': lines.encode(),
        'pretty.json': json.dumps(dict(train=rows), indent=2).encode(),
        'a.jsonl.gz': gzip.compress(lines.encode(), mtime=0), 'a.json.gz': gzip.compress(json.dumps(dict(data=rows)).encode())}
    for name, data in files.items(): (tmp_path/name).write_bytes(data)
    table.to_parquet(tmp_path/'a.parquet'); table.to_csv(tmp_path/'a.csv'); table.save_to_disk(tmp_path/'saved')
    for name in (*files, 'a.parquet', 'a.csv', 'saved'):
        assert normalise_rows(load_rows(str(tmp_path/name))) == rows, name
    (folder := tmp_path/'folder').mkdir()
    for name, part in (('train-1.jsonl', rows[:2]), ('train-2.jsonl', rows[2:]), ('test.jsonl', rows[:1])):
        (folder/name).write_text('\n'.join(map(json.dumps, part)))
    assert len(load_rows(str(folder))) == 3 and len(load_rows(str(folder), 'test')) == 1
    with pytest.raises(DataError, match="no files for 'held'"): load_rows(str(folder), 'held')
    (folder/'train-2.jsonl').write_text('{"prompt": "a"}')
    with pytest.raises(DataError, match=r'train-2\.jsonl:1: column .completion. is missing'): check_source(str(folder))

# ── cleaning, splitting, reporting

def test_cleaning_changes_only_what_nobody_wants():
    assert clean_text('e\u0301\r\nb\x07\ufeff  \n\n\n\nc\ud800') == 'é\nb\n\nc'
    code = 'def f(x):\n\n    return "a  b"\t# 👩‍👩‍👧'
    assert clean_text(code) == code and clean_text(clean_text('a \r\r b')) == clean_text('a \r\r b')

def test_dropped_rows_are_counted_by_reason(tokenizer):
    rows = [blue, PAIRS['hh'], dict(blue, chosen='green'), dict(blue, rejected=''), dict(blue, rejected='long '*50),
        dict(blue, rejected=None), dict(blue, rejected='red')]
    kept, counts = clean_rows(rows, tokenizer, 40)
    assert [r['rejected'] for r in kept] == ['green', 'red']
    assert counts == {'malformed': 1, 'empty': 1, 'identical pair': 1, 'duplicate': 1, 'too long': 1}
    assert clean_rows([]) == ([], dict.fromkeys(counts, 0))

def test_a_kept_row_always_fits(tokenizer):
    rows = [dict(prompt='a', completion='x y '*n) for n in range(1, 30)]
    for width in (4, 9, 30):
        kept, counts = clean_rows(rows, tokenizer, width)
        assert all(len(e.tokens) <= width for e in tokenize_rows(kept, tokenizer,
            width)) and len(kept) + sum(counts.values()) == 29

def test_no_prompt_on_both_sides():
    ask = 'Why {}?', ' WHY  {}?'
    rows = [dict(prompt=p.format(n), chosen='a', rejected=str(k)) for n in range(400) for k in range(2) for p in ask]
    train, held = split_rows(rows, .25, seed=3)
    key = lambda side: {' '.join(p.casefold().split()) for p in prompt_texts(side)}
    assert not key(train) & key(held) and len(train) + len(held) == len(rows) and .18 < len(held)/len(rows) < .32
    assert split_rows(rows[::-1], .25, seed=3)[1] == held[::-1] and key(split_rows(rows, .25, seed=4)[1]) != key(held)

def test_the_report_tells_the_length_bias(tokenizer):
    page = report([dict(prompt=f'q{n}', chosen='long answer'*(n % 4 > 0), rejected='no') for n in range(8)] + [blue],
        tokenizer, 'pairs')
    for fact in ('# pairs', '| rows | 9 |', '| usable | 7 |', '| dropped: empty | 2 |',
        '| chosen is longer | 85.7% |', 'tokens in'):
        assert fact in page, page

def test_show_prints_the_first_rows(tmp_path, tokenizer, capsys):
    (file := tmp_path/'rows.jsonl').write_text('\n'.join(json.dumps(row) for row in [PAIRS['hh']]*5))
    show_rows(str(file), tokenizer, 2)
    shown = capsys.readouterr().out
    assert shown.count('blue') == 2 and 'row 2' in shown and 'row 3' not in shown

# ── examples and batches

def test_a_pair_is_cut_alike(tokenizer):
    row = dict(prompt='one two three four five six', chosen='a', rejected='a much longer answer')
    (chosen, rejected), = tokenize_rows([row], tokenizer, 24)
    before = lambda e: e.tokens[~e.mask].tolist()
    assert before(chosen) == before(rejected) and len(rejected.tokens) == 24

def test_ranked_lists_become_pairs(tokenizer):
    pairs = tokenize_rows([dict(prompt='p', completions=['c', 'a', 'b', 'b2'], ranks=[3, 1, 2, 2])], tokenizer)
    text = lambda e: tokenizer.decode(e.tokens[e.mask], skip_special_tokens=True)
    assert {(text(a), text(b)) for a, b in pairs} == {('a', 'b'), ('a', 'b2'), ('a', 'c'), ('b', 'c'), ('b2', 'c')}

def test_a_row_that_does_not_fit_is_named(tokenizer):
    with pytest.raises(DataError, match='row 2: the completion takes'):
        tokenize_rows([dict(prompt='a', completion=c) for c in ('b', 'b '*50)], tokenizer, 20)
    with pytest.raises(DataError, match='prompts only'): tokenize_rows([dict(prompt='a')], tokenizer)

def some(n, longest=100, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        size = int(rng.integers(3, longest + 1))
        made.append(Example(np.full(size, i + 1, np.int32), np.arange(size) >= size//2))
    return made

def ids(batch): return sorted(set(np.asarray(batch.tokens)[np.asarray(batch.mask)].tolist()))

@pytest.mark.parametrize('drop_last', [True, False])
@pytest.mark.parametrize('pack', [True, False])
@pytest.mark.parametrize('n', [8, 61, 200])
def test_each_example_once_an_epoch_in_few_shapes(n, pack, drop_last):
    examples = some(n)
    batches = Batches(examples, 8, epochs=3, widths=(32, 64, 128), drop_last=drop_last,
        pack=pack) if not pack or n > 8 else None
    if batches is None: return
    seen = list(batches)
    assert len(seen) == len(batches) and {b.tokens.shape for b in seen} <= {(8, 32), (8, 64), (8, 128)}
    for epoch in range(3):
        part = seen[epoch*len(seen)//3:(epoch + 1)*len(seen)//3]
        found = [i for b in part for i in ids(b)]
        assert len(found) == len(set(found)) and (drop_last or len(found) == n)
        if not pack: assert len(found) > n - 8 # what does not fill a batch of its width moves up
        tokens = sum(int(b.mask.sum()) for b in part)
        assert tokens == sum(int(examples[i - 1].mask.sum()) for i in found)
    for b in seen: check_mask(b)

@pytest.mark.parametrize('pack', [True, False])
@pytest.mark.parametrize('stop', [0, 1, 5, 11, 12, 13, 24])
def test_position_is_restored_exactly(pack, stop):
    make = lambda **how: Batches(some(100), 4, seed=5, epochs=2, pack=pack, **how)
    whole = list(make())
    stop = min(stop, len(whole))
    first = make()
    walk = iter(first)
    for _ in range(stop): next(walk)
    state = json.loads(json.dumps(first.state()))
    again = make()
    again.restore(state)
    rest = list(again)
    assert len(rest) == len(whole) - stop
    for a, b in zip(whole[stop:], rest):
        for x, y in zip((a.tokens, a.mask, a.segments), (b.tokens, b.mask, b.segments)): assert np.array_equal(x, y)

def test_order_depends_on_seed_and_epoch_alone():
    order = lambda **how: [Batches(some(64), 8, **how).plan(e) for e in range(3)]
    assert order(seed=1) == order(seed=1) != order(seed=2)
    first, second, third = order(seed=1)
    assert first != second != third

def test_going_on_and_starting_over():
    batches = Batches(some(64), 8)
    for _ in batches: break
    assert len(list(batches)) == len(batches) - 1
    assert len(list(batches)) == len(batches), 'a loop after a whole epoch starts over'
    endless = Batches(some(16), 8, epochs=None)
    assert len([0 for _ in zip(range(99), endless)]) == 99

def test_restore_refuses_other_data():
    state = Batches(some(64), 8).state()
    for other in (Batches(some(65), 8), Batches(some(64), 4), Batches(some(64), 8, seed=1),
        Batches(some(64, seed=1), 8)):
        with pytest.raises(CheckpointError, match='changed'): other.restore(state)

def test_packed_rows_hold_examples_apart():
    examples, used = some(60, 50), 0
    for batch in Batches(examples, 4, pack=True, widths=(128,), drop_last=False):
        assert batch.tokens.shape == (4, 128)
        for tokens, mask, segments in zip(batch.tokens, batch.mask, batch.segments):
            assert not mask[segments == 0].any() and (np.diff(segments[segments > 0]) >= 0).all()
            for s in range(1, segments.max() + 1):
                example = examples[tokens[segments == s][0] - 1]
                assert np.array_equal(tokens[segments == s], example.tokens) and np.array_equal(mask[segments == s],
                    example.mask)
                used += len(example.tokens)
    assert used == sum(len(e.tokens) for e in examples)

def test_pairs_and_what_belongs_to_them():
    singles = some(40, 60)
    pairs, scores = list(zip(singles[::2], singles[1::2])), np.arange(20.)
    below = [np.full((len(e.tokens), 3), i, np.float32) for i, (e, _) in enumerate(pairs)]
    batches = Batches(pairs, 8, drop_last=False, extras={'ref_chosen': scores, 'chosen.below': below,
        'weight': np.full(20, 2., np.float32)})
    seen = []
    for batch in batches:
        assert isinstance(batch, Pairs) and batch.chosen.tokens.shape == batch.rejected.tokens.shape
        real = batches.index >= 0
        assert np.array_equal(batch.weight, 2*real) and not batch.chosen.mask[~real].any()
        assert np.array_equal(batch.ref_chosen[real], batches.index[real])
        for i, tokens, rows in zip(batches.index[real], batch.chosen.tokens[real], batch.chosen.below[real]):
            assert (rows[tokens != 0] == i).all() and (rows[tokens == 0] == 0).all()
        seen += batches.index[real].tolist()
    assert sorted(seen) == list(range(20))
    assert all(b.weight is None for b in Batches(pairs, 8))

def test_what_makes_no_batch_is_said():
    for bad, match in ((lambda: Batches([], 4), 'no examples'), (lambda: Batches(some(3), 4), 'do not fill'),
        (lambda: Batches(some(9), 4, widths=(8,)), 'widest batch'),
                       (lambda: Batches(some(9), 4, extras=dict(below=np.zeros(3))), 'one for each'),
                           (lambda: Batches(list(zip(some(9), some(9))), 4, pack=True), 'packed'),
                       (lambda: Batches([Example(np.ones(3), np.ones(3, bool))], 1, pack=True), 'without a prompt')):
        with pytest.raises(DataError, match=match): bad()
