"The Label and Models tabs from outside: who gets which question, what is refused, and two people who label by keys alone."
import json, re, threading, time
import pytest
from rlhf_lab.asking import add_item, borrow, hand_in, reopen
from rlhf_lab.answers import inert
from rlhf_lab.core import LabError
from rlhf_lab.feedback import Feedback, label_item, lease
from rlhf_lab.pool import agreement, fill, gold_marks, guidelines, labelled, leans
from test_app import HOSTILE, Toy, address, app, browser, call, client, place # fixtures, too

@pytest.fixture(scope='module')
def store(place): return Feedback(place/'labels.db')

@pytest.fixture(scope='module')
def toy(place): return str(place/'no model is needed')

def answers(store, n, prompt='Hi'): return [store.record(prompt, f'answer {i} of {prompt}', model='dpo') for i in range(n)]

def clear(store):
    "Nothing waits any more."
    for row in store.read('SELECT id FROM label_item'): store.write(label_item.update().values(min_submitted=0))

# Who gets which question

@pytest.mark.parametrize('people', [1, 2])
def test_nobody_gets_what_enough_others_have(tmp_path, people):
    store = Feedback(tmp_path/'votes.db')
    items = [add_item(store, 'pair', answers(store, 2, f'{i}'), people) for i in range(12)]
    held, most, crowded, lock = dict.fromkeys(items, 0), {}, [], threading.Lock()
    def work(who):
        while loan := borrow(store, who):
            with lock:
                held[loan['id']] += 1; most[loan['id']] = max(most.get(loan['id'], 0), held[loan['id']])
            time.sleep(.002)
            hand_in(store, loan['id'], 'submitted', who)
    threads = [threading.Thread(target=work, args=(store.session(f'p{i}'),)) for i in range(5)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert held == dict.fromkeys(items, people) # each exactly as often as was asked
    assert max(most.values()) <= people

def test_who_comes_back_late_finds_the_question_taken(tmp_path):
    store = Feedback(tmp_path/'votes.db')
    ann, bob = store.session('ann'), store.session('bob')
    item = add_item(store, 'pair', answers(store, 2))
    assert borrow(store, ann)['id'] == item and borrow(store, bob) is None
    store.write(lease.update().values(expires=0)) # ten minutes later
    assert borrow(store, bob)['id'] == item
    assert borrow(store, ann) is None # it was hers, and Bob holds it now
    with pytest.raises(LabError, match='your time'): hand_in(store, item, 'submitted', ann)
    hand_in(store, item, 'discarded', bob) # Bob skips it …
    assert borrow(store, ann)['id'] == item and borrow(store, bob) is None # … and nobody sees an item twice
    hand_in(store, item, 'submitted', ann)
    with pytest.raises(LabError, match='others have judged'): reopen(store, item, bob)
    assert reopen(store, item, ann)['id'] == item

def test_a_late_answer_counts_where_nobody_came(tmp_path):
    store = Feedback(tmp_path/'votes.db')
    ann = store.session('ann')
    item = add_item(store, 'pair', answers(store, 2))
    borrow(store, ann, seconds=0.)
    hand_in(store, item, 'submitted', ann)
    assert borrow(store, store.session('bob')) is None

# Where questions come from, and what came out

def test_the_pool_is_filled_from_the_command_line(tmp_path, capsys):
    from rlhf_lab.cli import main
    rows = [dict(prompt=f'Q{i}', chosen=f'yes {i}', rejected=f'no {i}') for i in range(20)]
    (tmp_path/'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (tmp_path/'ranks.jsonl').write_text(json.dumps(dict(prompt='Q', completions=['x', 'y', 'z'], ranks=[2, 1, 3])) + '\n')
    how = ['--store', str(tmp_path/'votes.db'), '--gold', '1']
    assert main(['label', '--data', str(tmp_path), *how]) == 0 and '20 pair' in capsys.readouterr().out # the folder of a run
    assert main(['label', '--data', str(tmp_path/'ranks.jsonl'), *how]) == 0
    assert main(['label', '--data', str(tmp_path/'pairs.jsonl'), *how]) == 0 and 'known before' in capsys.readouterr().out
    assert main(['label', '--data', str(tmp_path/'nothing.jsonl'), *how]) == 3 and 'nothing.jsonl' in capsys.readouterr().err
    store = Feedback(tmp_path/'votes.db')
    items = store.read('SELECT * FROM label_item')
    assert len(items) == 21 and all(item['gold_answer'] for item in items)
    firsts = [store.generation(json.loads(item['generation_ids'])[0])['completion'] for item in items if item['mode'] == 'pair']
    assert 3 < sum(text.startswith('yes') for text in firsts) < 17 # sides are shuffled
    for item in items: # and the right answer with them
        texts, gold = [store.generation(one)['completion'] for one in json.loads(item['generation_ids'])], json.loads(item['gold_answer'])
        if item['mode'] == 'pair': assert texts['ab'.index(gold['value'])].startswith('yes')
        else: assert dict(zip(texts, gold['ranks'])) == dict(x=2, y=1, z=3)

def test_agreement_gold_and_leans_are_those_of_the_votes(tmp_path):
    store = Feedback(tmp_path/'votes.db')
    people = [store.session(name) for name in ('ann', 'bob')]
    for i in range(12):
        ids = answers(store, 2, f'Q{i}')
        item = add_item(store, 'pair', ids, 2, gold=dict(value='a') if i < 4 else None)
        for who, value in zip(people, ('a', 'a' if i%3 else 'b')): store.judge('pair', ids, dict(value=value), session=who, ui=dict(tab='label', item=item))
    said = labelled(store)
    one, = agreement(said)
    assert (one.judged, one.shared, one.people) == (12, 12, 2)
    together, a = 8/12, 20/24 # Krippendorff, by hand: 1 − seen/expected disagreement
    assert abs(one.alpha - (1 - (1 - together)/(2*a*(1 - a)*24/23))) < 1e-9
    marks = gold_marks(store, said)
    assert (sum(marks['ann']), len(marks['ann']), sum(marks['bob'])) == (4, 4, 2)
    assert abs(leans(said)['first'][0] - 20/24) < 1e-9

# What is refused

NOTHING = ['cannot tell', '', '', *[None]*6] # why, order, better, marks

def test_nobody_labels_without_consent_and_names_and_gold_stay_hidden(client, store):
    clear(store)
    pair = answers(store, 2, 'Which?')
    item = add_item(store, 'pair', pair, gold=dict(value='b'))
    before = store.read('SELECT count(*) AS n FROM lease')
    for nobody in ('', None, 'f'*32, 7):
        reply = call(client, 'label-next', None, nobody)
        assert reply.status_code == 200 and inert('answer 0 of Which?') not in reply.text
        assert 'Not saved' in call(client, 'label-a', None, nobody, *NOTHING).text
    assert store.read('SELECT count(*) AS n FROM lease') == before
    who = store.session('dora')
    shown = call(client, 'label-next', None, who).text
    assert inert('answer 0 of Which?') in shown and not re.search(r'\bdpo\b|gold', shown)
    assert 'Not saved' in call(client, 'label-a', None, store.session('eve'), *NOTHING).text # it is lent to somebody else
    assert 'Saved' in call(client, 'label-a', None, who, *NOTHING).text
    vote = store.read("SELECT * FROM event WHERE kind = 'pair' ORDER BY id DESC LIMIT 1")[0]
    assert json.loads(vote['target_ids']) == pair and vote['guideline_version'] == guidelines(store)[-1].version
    ui = json.loads(vote['ui'])
    assert (ui['tab'], ui['blind'], ui['item']) == ('label', True, item) and ui['latency_ms'] >= 0

def test_what_annotators_are_told_and_asked_takes_the_token(client, store, place, monkeypatch):
    monkeypatch.setenv('RLHF_LAB_HOST', '0.0.0.0')
    (place/'more.jsonl').write_text(json.dumps(dict(prompt='Q', chosen='x', rejected='y')) + '\n')
    count = lambda: store.read('SELECT count(*) AS n FROM label_item')[0]['n']
    before, rules = count(), guidelines(store)[-1].version
    for known in ('', 'right'*6):
        monkeypatch.setenv('RLHF_LAB_ADMIN', known)
        assert inert('admin token') in call(client, 'label-change', '- **truth**: 1: a lie.', 'guess').text
        assert inert('admin token') in call(client, 'label-gold', 'guess').text
    from rlhf_lab.label import Keeper
    assert inert('admin token') in [*Keeper(store, Toy()).fill(str(place/'more.jsonl'), 1, 0, 'rating', 'guess', None)][-1]
    assert (count(), guidelines(store)[-1].version) == (before, rules)
    assert inert('gold items') in call(client, 'label-gold', 'right'*6).text
    assert 'In the pool' in [*Keeper(store, Toy()).fill(str(place/'more.jsonl'), 1, 0, 'rating', 'right'*6, None)][-1].replace('&#32;', ' ')
    assert count() == before + 1

# Two people and their keys

@pytest.mark.e2e
def test_two_people_label_by_keys_alone_and_never_the_same(browser, address, store):
    clear(store)
    items = [add_item(store, 'pair', answers(store, 2, f'pair {i}')) for i in range(2)]
    rank, rating = add_item(store, 'rank', answers(store, 3, 'rank')), add_item(store, 'rating', [store.record(HOSTILE, HOSTILE, model='sft')])
    pages = []
    for _ in range(2):
        page = browser.new_context(viewport=dict(width=1100, height=900)).new_page()
        page.errors = []
        page.on('pageerror', lambda error, page=page: page.errors.append(str(error)))
        page.set_default_timeout(30_000)
        page.goto(address); page.wait_for_selector('#agree')
        page.click('#agree'); page.wait_for_selector('#notice', state='hidden')
        page.get_by_role('tab', name='Label', exact=True).focus(); page.keyboard.press('Enter') # from here on, keys alone
        page.wait_for_selector('#label-question .question')
        page.evaluate('document.activeElement.blur()')
        pages.append(page)
    one, two = pages
    status = lambda page, words: page.locator('#label-status', has_text=words).wait_for()
    asks = lambda page, words: page.locator('#label-question', has_text=words).wait_for()
    asks(one, 'pair 0'); asks(two, 'pair 1')
    one.keyboard.press('2'); status(one, 'Saved'); asks(one, 'answer 0 of rank')
    one.keyboard.press('u'); status(one, 'Taken back'); asks(one, 'pair 0')
    one.keyboard.press('ArrowLeft'); status(one, 'Saved'); asks(one, 'answer 0 of rank')
    two.keyboard.press('3'); status(two, 'Saved'); asks(two, 'end of the answer')
    assert two.locator('#label-question').locator('img, script, svg, iframe, form, video, audio, style, a, base, meta, h1, details, pre').count() == 0
    one.wait_for_selector('#label-order'); two.wait_for_selector('#label-aspect-2')
    for key in '21': one.keyboard.press(key)
    one.keyboard.press('Enter'); status(one, 'each once') # C is missing
    one.keyboard.press('3'); one.keyboard.press('Enter'); status(one, 'Saved')
    two.keyboard.press('4'); two.keyboard.press('ArrowDown'); two.keyboard.press('ArrowUp'); two.keyboard.press('2')
    two.keyboard.press('Enter'); status(two, 'informativeness')
    two.keyboard.press('5'); two.keyboard.press('Control+s'); status(two, 'Draft kept')
    two.keyboard.press('Enter'); status(two, 'Saved')
    live = {json.loads(row['ui'])['item']: row for row in store.read("SELECT * FROM event WHERE ui LIKE '%item%' ORDER BY id")}
    said = {item: json.loads(live[item]['payload']) for item in (*items, rank, rating)}
    assert [said[item] for item in items] == [dict(value='a'), dict(value='both_good')]
    assert said[rank] == dict(ranks=[2, 1, 3]) and said[rating] == dict(clarity=4, politeness=2, informativeness=5)
    assert len({live[items[0]]['session_id'], live[items[1]]['session_id']}) == 2
    for page in pages:
        assert not page.errors and page.evaluate('window.ran') is None
        page.set_viewport_size(dict(width=390, height=800))
        assert page.evaluate('document.documentElement.scrollWidth') <= 390
        page.context.close()
