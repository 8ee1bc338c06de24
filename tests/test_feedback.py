"The store under fire: killed writers, a full disk, a foreign lock, files that are something else."
import json, random, signal, sqlite3, subprocess, sys, threading, time
import pytest
from rlhf_lab.core import DataError, LabError, UsageError
from rlhf_lab.feedback import Feedback

WRITER = '''
import sys, time
from rlhf_lab.feedback import Feedback
store = Feedback(sys.argv[1])
while True:
    name = store.record('Hi', 'Hello!', model='base')
    store.vote(name, 'up')
    print(name, flush=True)
    time.sleep(.01) # SQLite has no queue: without a breath one writer can starve the others
'''

@pytest.fixture
def store(tmp_path):
    store = Feedback(tmp_path/'votes.db')
    yield store
    store.close()

def ask(store, completion='Hello!', prompt='Hi', value=None, **extra):
    name = store.record(prompt, completion, **{'model': 'base', **extra})
    if value: store.vote(name, value)
    return name

def events(store): return store.read('SELECT count(*) AS n FROM event')[0]['n']

def test_what_killed_writers_acknowledged_is_there(tmp_path):
    path, said = tmp_path/'votes.db', []
    command = [sys.executable, '-c', WRITER, path]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)] # all create it
    for writer in writers: said.append(writer.stdout.readline().strip())
    time.sleep(random.uniform(.1, .5))
    for writer in writers: writer.send_signal(signal.SIGKILL)
    for writer in writers: said += writer.communicate()[0].split()
    store = Feedback(path)
    assert len(said) > 8 and all(len(name) == 26 for name in said)
    assert {vote['id'] for vote in store.votes()} >= set(said)
    assert store.read('PRAGMA integrity_check') == [{'integrity_check': 'ok'}]

def test_like_unlike_dislike_like_is_four_events_and_one_judgement(store):
    name = ask(store)
    for value in ('up', 'none', 'down', 'up'): assert store.vote(name, value)
    assert (events(store), [v['value'] for v in store.votes()]) == (4, ['up'])
    chain = store.read('SELECT id, supersedes FROM event ORDER BY id')
    assert {event['supersedes'] for event in chain} < {event['id'] for event in chain} | {None}

def test_a_hundred_equal_votes_at_once_are_one(store):
    name = ask(store)
    threads = [threading.Thread(target=store.vote, args=(name, 'up')) for _ in range(100)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert (events(store), store.value(name)) == (1, 'up')

def test_nothing_to_withdraw_writes_nothing(store):
    assert store.vote(ask(store), 'none') is None and events(store) == 0

def test_events_are_never_changed(store):
    ask(store, value='up')
    with pytest.raises(sqlite3.IntegrityError): store.db.execute("UPDATE event SET value = 'down'")

def test_a_full_disk_loses_nothing_and_the_store_recovers(store):
    name = ask(store)
    pages = store.read('PRAGMA page_count')[0]['page_count']
    store.db.execute(f'PRAGMA max_page_count = {pages}')
    with pytest.raises(LabError, match='disk is full: nothing was saved'): ask(store, 'x'*100_000)
    store.db.execute('PRAGMA max_page_count = 1000000')
    assert store.vote(name, 'up')
    assert store.read('SELECT count(*) AS n FROM generation') == [{'n': 1}]

def test_a_foreign_lock_is_waited_for_and_then_named(store, tmp_path):
    name, other = ask(store), sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    other.execute('BEGIN IMMEDIATE')
    threading.Timer(.3, lambda: other.execute('COMMIT')).start()
    assert store.vote(name, 'up') # waited
    store.db.execute('PRAGMA busy_timeout = 100')
    other.execute('BEGIN IMMEDIATE')
    with pytest.raises(LabError, match='locked by another program: nothing was saved') as caught:
        store.vote(name, 'down')
    assert '\n' not in str(caught.value)
    other.execute('ROLLBACK'); other.close()
    assert store.vote(name, 'down') and events(store) == 2

def test_settings_that_keep_votes(store):
    read = lambda name: list(store.read(f'PRAGMA {name}')[0].values())[0]
    names = 'journal_mode', 'synchronous', 'foreign_keys', 'busy_timeout'
    assert [read(name) for name in names] == ['wal', 2, 1, 5000]

@pytest.mark.parametrize('content, message',
    [(b'some text, but no database'*60, 'not a feedback store'), (None, 'cannot')])
def test_a_file_that_is_something_else(tmp_path, content, message):
    path = tmp_path/'votes.db'
    if content: path.write_bytes(content)
    else: path.mkdir()
    with pytest.raises(LabError, match=message): Feedback(path)

def test_a_store_from_the_future_is_left_alone(store):
    store.db.execute('PRAGMA user_version = 99')
    with pytest.raises(LabError, match='newer rlhf_lab'): Feedback(store.path)

def test_odd_text_survives(store):
    text = 'a\0b \udcff 🎬\r\n<script>'
    assert store.generation(ask(store, text, value='up'))['completion'] == 'a\0b ? 🎬\r\n<script>'
    assert store.rows()[0]['completion'] == 'a\0b ? 🎬\r\n<script>'

def test_refusals_are_sentences(store, tmp_path):
    with pytest.raises(LabError, match='no answer'): store.vote('x', 'up')
    with pytest.raises(UsageError, match='up, down or none'): store.vote(ask(store), 'sideways')
    with pytest.raises(UsageError, match='rows or as pairs'): store.export(tmp_path/'x', 'poems')
    with pytest.raises(DataError, match='no votes of this kind'): store.export(tmp_path/'x.jsonl', 'pairs')
    ask(store, value='up'); ask(store, prompt=[{'role': 'user', 'content': 'Hi'}], value='up')
    with pytest.raises(DataError, match='chats and plain texts'): store.export(tmp_path/'x.jsonl')
    assert not list(tmp_path.glob('*x*'))

def test_pairs_join_what_is_the_same_question(store):
    ask(store, 'good', 'Write  a\nreview', 'up'); ask(store, 'bad', ' Write a review ', 'down')
    ask(store, 'good', 'Write a review', 'down'); ask(store, 'other', 'Another', 'down')
    assert store.pairs() == [{'prompt': 'Write  a\nreview', 'chosen': 'good', 'rejected': 'bad'}]

@pytest.mark.parametrize('kind, columns',
    [('rows', {'prompt', 'completion', 'label'}), ('pairs', {'prompt', 'chosen', 'rejected'})])
@pytest.mark.parametrize('prompt', ['Hi', [{'role': 'user', 'content': 'Hi'}]])
def test_exports_load_as_data(store, tmp_path, kind, columns, prompt):
    ask(store, 'good', prompt, 'up'); ask(store, 'bad', prompt, 'down'); ask(store, 'no vote', prompt)
    path = store.export(tmp_path/'out'/f'{kind}.jsonl', kind)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == getattr(store, kind)() and all(set(row) == columns for row in rows)
    loaded = pytest.importorskip('rlhf_lab.data').load_rows(str(path))
    assert set(loaded.column_names) == columns and loaded[0]['prompt'] == prompt
