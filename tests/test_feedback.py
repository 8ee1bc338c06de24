"The store under fire: killed writers, a full disk, a foreign lock, old and foreign files, two servers' worth of threads, PostgreSQL."
import json, os, random, shutil, signal, sqlite3, subprocess, sys, tempfile, threading, time
from pathlib import Path
import pytest, sqlalchemy as sa
from rlhf_lab.core import DataError, LabError, UsageError
from rlhf_lab.exports import freeze
from rlhf_lab.forms import FORMATS, bare, judgements, preference
from rlhf_lab.feedback import SCHEMA, Feedback, event, generation, prompt_hash, split_of
from rlhf_lab.upkeep import Mirror, backup, erase, page

@pytest.fixture
def store(tmp_path):
    store = Feedback(tmp_path/'votes.db')
    yield store
    store.close()

def ask(store, completion='Hello!', prompt='Hi', value=None, **extra):
    name = store.record(prompt, completion, **{'model': 'base', **extra})
    if value: store.vote(name, value)
    return name

def count(store, table='event'): return store.read(f'SELECT count(*) AS n FROM {table}')[0]['n']

def at_once(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads: thread.start()
    for thread in threads: thread.join()

# ── D1, D2: killed ──

NURSERY = '''
import os, random, signal, sys, threading, time, types
core = sys.modules['rlhf_lab.core'] = types.ModuleType('rlhf_lab.core') # the real one loads JAX, for seconds
for name in ('LabError', 'DataError', 'UsageError'): setattr(core, name, type(name, (Exception,), {}))
from rlhf_lab.feedback import Feedback
path, rounds, writers, threads = sys.argv[1], *map(int, sys.argv[2:])
Feedback(path + '.warm').close() # libraries are loaded
def write(store):
    while True:
        name = store.record('Hi', 'Hello!', model='base')
        os.write(1, f'{name}\\n'.encode())
        os.write(1, f'{store.vote(name, "up")}\\n'.encode())
        time.sleep(.001) # SQLite has no queue: without a breath one writer can starve the others
def child():
    store = Feedback(path)
    for _ in range(threads - 1): threading.Thread(target=write, args=[store], daemon=True).start()
    write(store)
for _ in range(rounds): # all of the first round create the file
    born = []
    for _ in range(writers):
        if not (pid := os.fork()):
            try: child()
            finally: os._exit(1)
        born.append(pid)
    time.sleep(random.uniform(.05, .5))
    for pid in born: os.kill(pid, signal.SIGKILL)
    for pid in born: os.waitpid(pid, 0)
'''

def acknowledged(path, *numbers) -> list:
    "Ids that killed writers said were saved."
    done = subprocess.run([sys.executable, '-c', NURSERY, path, *map(str, numbers)], stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0
    return done.stdout.split()

def nothing_lost(path, said):
    store = Feedback(path)
    kept = [row['id'] for table in ('generation', 'event') for row in store.read(f'SELECT id FROM {table}')]
    assert not set(said) - set(kept) and len(said) == len(set(said)) and len(kept) == len(set(kept))
    assert store.read('PRAGMA integrity_check') == [{'integrity_check': 'ok'}] and not store.read('PRAGMA foreign_key_check')

def test_what_killed_writers_acknowledged_is_there(tmp_path):
    said = acknowledged(tmp_path/'votes.db', 6, 4, 1)
    assert len(said) > 20 and all(len(name) == 26 for name in said)
    nothing_lost(tmp_path/'votes.db', said)

@pytest.mark.slow
@pytest.mark.parametrize('rounds, writers, threads, least', [(50, 4, 1, 5000), (20, 1, 30, 500)], ids=['D1', 'D2'])
def test_fifty_rounds_of_killing_lose_nothing(tmp_path, rounds, writers, threads, least):
    said = acknowledged(tmp_path/'votes.db', rounds, writers, threads)
    print(f'{len(said)} acknowledged')
    nothing_lost(tmp_path/'votes.db', said)
    assert len(said) >= least

# ── D3: once ──

def test_like_unlike_dislike_like_is_four_events_and_one_judgement(store):
    name = ask(store)
    for value in ('up', 'none', 'down', 'up'): assert store.vote(name, value)
    assert (count(store), [v['value'] for v in store.votes()]) == (4, ['up'])
    chain = store.read('SELECT id, supersedes FROM event ORDER BY id')
    assert [one['supersedes'] for one in chain] == [None, *(one['id'] for one in chain[:-1])]

def test_a_hundred_equal_requests_at_once_are_one(store, tmp_path):
    name, other = ask(store), Feedback(tmp_path/'votes.db')
    at_once(*[lambda s=s: s.vote(name, 'up') for s in (store, other)]*50)
    assert (count(store), store.value(name)) == (1, 'up')
    at_once(*[lambda s=s: s.judge('flag', [name], {}, reasons=['unsafe'], nonce='click 1') for s in (store, other)]*50)
    assert count(store) == 2
    other.close()

def test_a_repeated_click_counts_once_even_after_a_change_of_mind(store):
    name = ask(store)
    assert store.judge('thumb', [name], {'value': 'up'}, nonce='first') and store.judge('thumb', [name], {'value': 'down'}, nonce='second')
    assert store.judge('thumb', [name], {'value': 'up'}, nonce='first') is None and store.value(name) == 'down'
    assert store.judge('thumb', [name], {'value': 'up'}, nonce='third') and store.value(name) == 'up'

def test_a_doubled_flag_is_one_event_and_a_new_reason_another(store):
    name = ask(store)
    assert store.judge('flag', [name], {}, reasons=['unsafe']) and not store.judge('flag', [name], {}, reasons=['unsafe'])
    assert store.judge('flag', [name], {}, reasons=['unsafe', 'other'], comment='Look!') and count(store) == 2

def test_one_judgement_per_person_and_unordered_pair(store):
    a, b, ann, bob = ask(store), ask(store, 'No.'), store.session('ann'), store.session('bob')
    first = store.judge('pair', [a, b], {'winner': 'a'}, session=ann)
    store.judge('skip', [a, b], {}, session=bob)
    last = store.judge('pair', [b, a], {'winner': 'both_bad'}, session=store.session('ann')) # ann from another browser
    live = {one['annotator_id']: one for one in page(store) if store.receipt(one['id'])['live']}
    assert live['ann']['id'] == last and live['ann']['supersedes'] == first and live['bob']['kind'] == 'skip'

def test_nothing_to_withdraw_writes_nothing(store):
    assert store.vote(ask(store), 'none') is None and count(store) == 0

@pytest.mark.parametrize('statement', ["UPDATE event SET payload = '{}'", 'DELETE FROM event', "UPDATE event SET erased = 1, target_ids = '[]'"])
def test_events_are_never_changed(store, statement):
    ask(store, value='up')
    with pytest.raises(LabError, match='events are never'): store.write(sa.text(statement))
    assert store.votes()[0]['value'] == 'up'

# ── D4, D5: no room, no turn ──

def test_a_full_disk_loses_nothing_and_the_store_recovers(store):
    name = ask(store)
    pages = store.read('PRAGMA page_count')[0]['page_count']
    limit = f'max_page_count = {pages}'
    sa.event.listen(store.engine, 'begin', lambda connection: connection.exec_driver_sql(f'PRAGMA {limit}'))
    with pytest.raises(LabError, match='disk is full: nothing was saved'): ask(store, 'x'*100_000)
    limit = 'max_page_count = 1000000'
    assert store.vote(name, 'up') and count(store, 'generation') == 1

@pytest.fixture
def small_disk(tmp_path):
    "A file system of 8 MB."
    (place := tmp_path/'disk').mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', place], capture_output=True).returncode: pytest.skip('may not mount a small disk here')
    yield place
    subprocess.run(['umount', '-l', place], check=True)

def test_a_disk_that_really_is_full(small_disk):
    store = Feedback(small_disk/'votes.db')
    name = ask(store)
    with open(small_disk/'other', 'wb') as other, pytest.raises(OSError): other.write(b'x'*9_000_000)
    with pytest.raises(LabError, match='nothing was saved') as caught:
        for _ in range(100): ask(store, 'x'*100_000)
    assert '\n' not in str(caught.value)
    kept = count(store, 'generation')
    (small_disk/'other').unlink()
    assert store.vote(name, 'up') and count(store, 'generation') == kept and store.read('PRAGMA integrity_check') == [{'integrity_check': 'ok'}]
    store.close()

def test_a_foreign_lock_is_waited_for_and_then_named(store, tmp_path):
    name, other = ask(store), sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    other.execute('BEGIN IMMEDIATE')
    threading.Timer(.3, lambda: other.execute('COMMIT')).start()
    assert store.vote(name, 'up') # waited
    other.execute('BEGIN IMMEDIATE')
    hasty = Feedback(store.path, wait=.1) # opening does not wait
    with pytest.raises(LabError, match='locked by another program: nothing was saved') as caught: hasty.vote(name, 'down')
    assert '\n' not in str(caught.value) and hasty.value(name) == 'up' # reading does not wait either
    other.execute('ROLLBACK'); other.close()
    assert hasty.vote(name, 'down') and count(store) == 2
    hasty.close()

@pytest.mark.slow
def test_a_foreign_lock_of_three_seconds(store):
    names, other, done = [ask(store) for _ in range(10)], sqlite3.connect(store.path, isolation_level=None, check_same_thread=False), []
    other.execute('BEGIN IMMEDIATE')
    threading.Timer(3, lambda: other.execute('COMMIT')).start()
    start = time.monotonic()
    at_once(*[lambda name=name: done.append(store.vote(name, 'up')) for name in names])
    assert all(done) and count(store) == 10 and 2.5 < time.monotonic() - start < 5

def test_settings_that_keep_votes(store):
    read = lambda name: list(store.read(f'PRAGMA {name}')[0].values())[0]
    names = 'journal_mode', 'synchronous', 'foreign_keys', 'busy_timeout'
    assert [read(name) for name in names] == ['wal', 2, 1, 5000]

# ── D6: other forms ──

FORM_1 = '''
CREATE TABLE generation (id TEXT PRIMARY KEY, ts INTEGER NOT NULL, conversation_id TEXT NOT NULL, prompt TEXT NOT NULL, messages TEXT,
    completion TEXT NOT NULL, model TEXT NOT NULL, run TEXT NOT NULL, weights_sha256 TEXT, sampling TEXT NOT NULL, finish_reason TEXT NOT NULL) STRICT;
CREATE TABLE event (id TEXT PRIMARY KEY, ts INTEGER NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('thumb', 'withdraw')),
    generation_id TEXT NOT NULL REFERENCES generation, value TEXT NOT NULL CHECK (value IN ('up', 'down', 'none')),
    supersedes TEXT UNIQUE REFERENCES event) STRICT;
CREATE INDEX event_generation ON event(generation_id);
CREATE TRIGGER event_forever BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;
CREATE VIEW last_event AS SELECT event.* FROM event LEFT JOIN event AS later ON later.supersedes = event.id WHERE later.id IS NULL;
CREATE VIEW vote AS SELECT generation.*, last_event.value, last_event.id AS event_id, last_event.ts AS voted
    FROM last_event JOIN generation ON generation.id = generation_id WHERE value != 'none' ORDER BY last_event.id;
PRAGMA user_version = 1;
'''

def old_store(path) -> tuple: # generations, events, votes
    db = sqlite3.connect(path)
    db.row_factory = sqlite3.Row
    db.executescript(FORM_1)
    chat = json.dumps([dict(role='user', content='Hi  you')], ensure_ascii=False)
    for n in range(20):
        words = dict(prompt=f'Hi {n}', messages=chat) if n % 2 else dict(prompt=f'é {n}\0', messages=None)
        row = dict(id=f'G{n:02}', ts=n, conversation_id=f'G{n:02}', **words, completion=f'a {n}\r\n🎬', model='sft', run='r', weights_sha256=None,
            sampling='{"seed": 3}', finish_reason='stop')
        db.execute(f'INSERT INTO generation VALUES ({",".join("?"*len(row))})', [*row.values()])
    last = {}
    for n, (g, value) in enumerate([(0, 'up'), (1, 'down'), (0, 'none'), (0, 'down'), (2, 'up'), (3, 'up'), (3, 'none')]):
        values = f'E{n}', 100 + n, 'withdraw' if value == 'none' else 'thumb', f'G{g:02}', value, last.get(g)
        db.execute('INSERT INTO event VALUES (?,?,?,?,?,?)', values); last[g] = f'E{n}'
    db.commit()
    content = tuple([dict(row) for row in db.execute(f'SELECT * FROM {name}')] for name in ('generation', 'event', 'vote'))
    db.close()
    return content

def test_a_store_of_form_1_opens_with_everything_in_it(tmp_path):
    said, events, votes = old_store(tmp_path/'votes.db')
    at_once(*[lambda: Feedback(tmp_path/'votes.db').close()]*3) # three programs start at once
    store = Feedback(tmp_path/'votes.db')
    assert [{name: row[name] for name in said[0]} for row in store.read('SELECT * FROM generation ORDER BY id')] == said
    new = store.read('SELECT * FROM event ORDER BY id')
    assert [(row['id'], row['ts'], row['kind'], json.loads(row['target_ids']), row['supersedes']) for row in new] \
        == [(row['id'], row['ts'], row['kind'], [row['generation_id']], row['supersedes']) for row in events]
    assert [{name: row[name] for name in votes[0]} for row in store.votes()] == votes
    assert [store.value(f'G{n:02}') for n in range(4)] == ['down', 'down', 'up', 'none']
    assert store.generation('G01')['prompt_sha256'] == prompt_hash([dict(role='user', content='Hi you')])
    assert {row['split'] == split_of(row['prompt_sha256']) for row in store.read('SELECT * FROM generation')} == {True}
    assert store.vote('G00', 'up') and store.read('SELECT supersedes FROM event WHERE id > :id ORDER BY ts DESC', id='0')[0]['supersedes'] == 'E3'
    assert not store.read('PRAGMA foreign_key_check') and store.read('PRAGMA user_version') == [{'user_version': 2}] # an old program refuses it
    store.close()

def test_a_migration_that_fails_changes_nothing(tmp_path):
    said, events, _ = old_store(tmp_path/'votes.db')
    db = sqlite3.connect(tmp_path/'votes.db')
    db.execute("UPDATE generation SET messages = 'no JSON' WHERE id = 'G19'"); db.commit()
    with pytest.raises(Exception): Feedback(tmp_path/'votes.db')
    assert db.execute('SELECT count(*) FROM vote').fetchone() == (3,) and db.execute('PRAGMA user_version').fetchone() == (1,)
    db.close()

def test_the_migrations_make_the_tables_of_the_notebook(store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    with store.engine.connect() as connection: assert compare_metadata(MigrationContext.configure(connection), SCHEMA) == []

@pytest.mark.parametrize('future', ['PRAGMA user_version = 99', "UPDATE alembic_version SET version_num = '0099'"])
def test_a_store_from_the_future_is_left_alone(store, future):
    with store.transaction() as connection: connection.exec_driver_sql(future)
    store.close()
    if 'PRAGMA' in future: # form 3 of a program that has left Alembic behind
        with store.transaction() as connection: connection.exec_driver_sql('DROP TABLE alembic_version')
    before = store.path.read_bytes()
    with pytest.raises(LabError, match='newer rlhf_lab') as caught: Feedback(store.path)
    assert '\n' not in str(caught.value) and store.path.read_bytes() == before

def test_there_is_no_way_back(store):
    from importlib.resources import files
    from alembic import command
    from alembic.config import Config
    with store.transaction() as connection, pytest.raises(LabError, match='put a backup in its place'):
        config = Config(attributes=dict(connection=connection))
        config.set_main_option('script_location', str(files('rlhf_lab')/'migrations'))
        command.downgrade(config, '-1')

@pytest.mark.parametrize('content, message',
    [(b'some text, but no database'*60, 'not a feedback store'), (None, 'cannot')])
def test_a_file_that_is_something_else(tmp_path, content, message):
    path = tmp_path/'votes.db'
    if content: path.write_bytes(content)
    else: path.mkdir()
    with pytest.raises(LabError, match=message): Feedback(path)

# ── D7, D8, D9: mirror, descriptors, size ──

@pytest.mark.parametrize('harm', [lambda data: data[:-9], lambda data: data[data.index(b'\n') + 1:], lambda data: data + b'{"id"', lambda data: b''])
def test_a_harmed_mirror_is_made_anew(store, tmp_path, harm):
    mirror = Mirror(store, tmp_path/'votes.jsonl')
    for n in range(5): ask(store, f'a {n}', value='up')
    whole = mirror.path.read_bytes()
    assert [json.loads(line)['completions'] for line in whole.splitlines()] == [[f'a {n}'] for n in range(5)]
    mirror.path.write_bytes(harm(whole))
    other = Feedback(store.path)
    assert Mirror(other, mirror.path).path.read_bytes() == whole
    other.close()

def test_a_mirror_that_cannot_be_written_costs_no_vote(store, tmp_path):
    mirror = Mirror(store, tmp_path/'votes.jsonl')
    mirror.path.unlink(); mirror.path.mkdir()
    assert store.vote(ask(store), 'up') and count(store) == 1

def test_a_thousand_requests_open_nothing_that_stays(store):
    name = ask(store)
    store.vote(name, 'down')
    before = len(os.listdir('/proc/self/fd'))
    for n in range(200):
        store.vote(name, ('up', 'down')[n % 2])
        for _ in range(4): store.value(name)
    assert len(os.listdir('/proc/self/fd')) <= before + 2

def fill(store, n: int):
    "Many thumbs by a few people, without the way through `vote`."
    people = [store.session(f'person {k}') for k in range(10)]
    with store.transaction() as db:
        ids = [store.member(secret)['id'] for secret in people]
        digests = [prompt_hash(f'question {k}') for k in range(n//4 + 1)]
        blank = dict(ts=0, conversation_id='', turn=0, finish_reason='stop', model='base', stage='', run='', sampling='{}', backend='{}', truncated_tokens=0, source='')
        names = [f'G{k:07}' for k in range(n)]
        db.execute(generation.insert(), [dict(blank, id=name, session_id='', prompt=f'question {k//4}', prompt_sha256=digests[k//4], split='train',
            completion=f'answer {k} ' + 'of some length '*8) for k, name in enumerate(names)])
        db.execute(event.insert(), [dict(id=f'E{k:07}', ts=k, mono_ns=k, kind='thumb', session_id=ids[k % 10], target_ids=f'["{name}"]', subject=f'thumb {name}',
            payload='{"value":"%s"}' % ('up', 'down')[k % 2], reason_codes='[]', comment='', idempotency_key=name, ui='{"latency_ms":9000}', schema_version=2)
            for k, name in enumerate(names)])

def memory() -> float: return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/1e6

@pytest.mark.parametrize('n', [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_large_store_answers_quickly(store, tmp_path, n):
    fill(store, n)
    freeze(store, tmp_path/'warm', ('unpaired',), annotators=('person 0',)) # libraries are loaded
    took, before = {}, memory()
    def timed(name, call):
        start = time.perf_counter(); result = call(); took[name] = time.perf_counter() - start
        return result
    writing, votes = threading.Event(), []
    def write():
        while not writing.is_set(): votes.append(store.vote(ask(store), 'up'))
    writer = threading.Thread(target=write); writer.start()
    copy = timed('backup', lambda: backup(store, tmp_path/'copy.db'))
    writing.set(); writer.join()
    assert len(timed('page', lambda: page(store, 50))) == 50 and votes
    version = timed('export', lambda: freeze(store, tmp_path, ('preference', 'unpaired')))
    grown = memory() - before
    print(f'{n} events:', {name: f'{seconds:.2f} s' for name, seconds in took.items()}, f'+{grown:.0f} MB')
    assert version.counts['unpaired'] >= n and version.counts['preference'] >= n//2
    kept = Feedback(copy)
    assert n <= count(kept) <= n + len(votes) and kept.read('PRAGMA integrity_check') == [{'integrity_check': 'ok'}] and not kept.read('PRAGMA foreign_key_check')
    kept.close()
    assert took['backup'] < 2 and took['page'] < .2 and took['export'] < 10 and grown < 150

# ── D11: taken back and forgotten ──

def bytes_of(folder, words: str) -> list: return [file.name for file in folder.iterdir() if file.is_file() and words.encode() in file.read_bytes()]

def test_withdrawn_is_in_no_export_and_erased_in_no_byte(store, tmp_path):
    mirror, ann = Mirror(store, tmp_path/'votes.jsonl'), store.session('Ann Example')
    kept = ask(store, 'Public words', value='up')
    mine = store.record('CANARYprompt', 'CANARYanswer', model='base', session=ann, more=dict(prompt_token_ids=[4242424242], logprobs=[.5]))
    store.judge('edit', [mine], {'completion': 'CANARYedit'}, session=ann, comment='CANARYcomment', ui={'tab': 'CANARYui'})
    vote = store.vote(kept, 'up', session=ann)
    version = freeze(store, tmp_path/'sets', ('unpaired',), kinds=('thumb', 'edit'), split='all')
    assert bytes_of(tmp_path, 'CANARY') and bytes_of(tmp_path, '4242424242') and bytes_of(tmp_path, 'Ann Example')
    store.withdraw(vote)
    assert [vote['value'] for vote in store.votes()] == ['up']
    assert store.receipt(vote)['versions'] == [version.id]
    done = erase(store, 'Ann Example')
    assert done == dict(generations=1, events=3, versions=[version.id])
    assert [bytes_of(tmp_path, words) for words in ('CANARY', '4242424242', 'Ann Example')] == [[], [], []] and bytes_of(tmp_path, 'Public words')
    assert len(page(store)) == count(store) == 4 and store.generation(mine)['erased']
    assert json.loads(mirror.path.read_text().splitlines()[-1])['payload'] == {}
    assert freeze(store, tmp_path/'sets', ('unpaired',), split='all').excluded == {'withdrawn': 1, 'erased': 1}

def test_answers_can_be_erased_by_their_ids(store, tmp_path):
    name = ask(store, 'CANARY', value='up')
    assert erase(store, answers=(name,)) == dict(generations=1, events=0, versions=[]) and not bytes_of(tmp_path, 'CANARY') and store.votes() == []

def test_nothing_private_is_kept(store, tmp_path):
    "E6: the secret of a browser is nowhere, and exports name nobody."
    secret = store.session()
    a, b = ask(store), ask(store, 'No.')
    store.judge('pair', [a, b], {'value': 'a'}, session=secret)
    alias = page(store)[0]['annotator_id']
    version = freeze(store, tmp_path/'sets', ('preference', 'unpaired', 'arena'), split='all')
    assert secret not in alias and alias.startswith('anon-')
    for file in tmp_path.rglob('*'):
        if file.is_file(): assert secret.encode() not in file.read_bytes(), file
    assert not [file for file in version.folder.rglob('*') if file.is_file() and alias.encode() in file.read_bytes()]

# ── words ──

def test_odd_text_survives(store):
    text = 'a\0b \udcff 🎬\r\n<script>'
    assert store.generation(ask(store, text, value='up'))['completion'] == 'a\0b ? 🎬\r\n<script>'
    assert store.votes()[0]['completion'] == 'a\0b ? 🎬\r\n<script>'

def test_refusals_are_sentences(store, tmp_path):
    with pytest.raises(LabError, match='no answer'): store.vote('x', 'up')
    with pytest.raises(UsageError, match='up, down or none'): store.vote(ask(store), 'sideways')
    with pytest.raises(UsageError, match='no judgement'): store.judge('poem', [], {})
    with pytest.raises(UsageError, match='no column'): store.record('Hi', 'x', model='base', more={'colour': 'red'})
    with pytest.raises(UsageError, match='no form'): freeze(store, tmp_path/'x', ('poems',))
    with pytest.raises(LabError, match='no event'): store.withdraw('x')
    with pytest.raises(LabError, match='cannot keep feedback'): Feedback('mysql://host/db')
    with pytest.raises(DataError, match='all of 0 judgements were left out'): freeze(store, tmp_path/'x')
    ask(store, value='up'); ask(store, prompt=[{'role': 'user', 'content': 'Hi'}], value='up')
    with pytest.raises(DataError, match='chats and plain texts'): freeze(store, tmp_path/'x', ('unpaired',), split='all')
    assert not list(tmp_path.glob('*x*'))

def test_pairs_join_what_is_the_same_question(store):
    ask(store, 'good', 'Write  a\nreview', 'up'); ask(store, 'bad', ' Write a review ', 'down'); ask(store, 'other', 'Another', 'down')
    assert [bare(row) for row in preference(judgements(store))] == [{'prompt': 'Write  a\nreview', 'chosen': 'good', 'rejected': 'bad'}]

@pytest.mark.parametrize('kind, columns', [('unpaired', {'prompt', 'completion', 'label'}), ('preference', {'prompt', 'chosen', 'rejected'})])
@pytest.mark.parametrize('prompt', ['Hi', [{'role': 'user', 'content': 'Hi'}]])
def test_exports_load_as_data(store, tmp_path, kind, columns, prompt):
    ask(store, 'good', prompt, 'up'); ask(store, 'bad', prompt, 'down'); ask(store, 'no vote', prompt)
    path = freeze(store, tmp_path/'out', (kind,), split='all').folder/'data'/f'{kind}.jsonl'
    rows = [bare(json.loads(line)) for line in path.read_text().splitlines()]
    assert rows == [bare(row) for row in FORMATS[kind](judgements(store))] and all(set(row) == columns for row in rows)
    loaded = pytest.importorskip('rlhf_lab.data').load_rows(str(path))
    assert columns <= set(loaded.column_names) and loaded[0]['prompt'] == prompt

# ── PostgreSQL ──

@pytest.fixture(scope='module')
def server():
    "A PostgreSQL of our own, on a socket in a folder of its own."
    pytest.importorskip('psycopg', reason='the driver psycopg is not installed')
    there = [Path(found).resolve().parent for found in [shutil.which('initdb')] if found] + sorted(Path('/usr/lib/postgresql').glob('*/bin'))
    if not there: pytest.skip('PostgreSQL is not installed (Debian: apt-get install postgresql)')
    place = tempfile.mkdtemp(prefix='pg')
    who = dict(user='postgres') if os.getuid() == 0 else {}
    if who: shutil.chown(place, 'postgres')
    quiet = dict(who, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([there[-1]/'initdb', '-D', f'{place}/data', '-U', 'lab', '-A', 'trust', '-E', 'UTF8', '--no-sync'], check=True, **quiet)
    process = subprocess.Popen([there[-1]/'postgres', '-D', f'{place}/data', '-k', place, '-c', 'listen_addresses=', '-c', 'fsync=off'], **quiet)
    url = f'postgresql://lab@/postgres?host={place}'
    for _ in range(100):
        try: sa.create_engine(url.replace('postgresql:', 'postgresql+psycopg:')).connect().close(); break
        except sa.exc.OperationalError: time.sleep(.1)
    yield url
    process.send_signal(signal.SIGINT); process.wait(20); shutil.rmtree(place, ignore_errors=True)

def test_postgres_keeps_the_same_promises(server, tmp_path):
    stores, made = [], []
    at_once(*[lambda: stores.append(Feedback(server)) for _ in range(3)]) # three servers start at once
    one, two, three = stores
    a, b = ask(one, 'good\0', value='up'), ask(two, 'bad')
    assert three.generation(a)['completion'] == 'good\ufffd' # PostgreSQL cannot keep the character 0
    at_once(*[lambda s=s: s.vote(b, 'down') for s in stores]*10)
    ann = one.session('ann')
    at_once(*[lambda s=s: made.append(s.judge('pair', [a, b], {'value': 'a'}, session=ann, nonce='click')) for s in stores]*5)
    assert sum(map(bool, made)) == 1 and count(two) == 3
    for value in ('none', 'up'): three.vote(a, value)
    assert [row['value'] for row in one.votes()] == ['down', 'up'] and len(preference(judgements(one))) == 1
    with pytest.raises(LabError, match='events are never changed'): one.write(sa.text("UPDATE event SET payload = '{}'"))
    version = freeze(two, tmp_path, ('preference', 'unpaired'), split='all')
    assert version.counts == dict(preference=1, unpaired=2) and three.receipt([name for name in made if name][0])['versions'] == [version.id]
    assert erase(one, 'ann')['events'] == 1 and page(three, kinds=('pair',))[0]['payload'] == {}
    with pytest.raises(UsageError, match='pg_dump'): backup(one, tmp_path/'copy.db')
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    with one.engine.connect() as connection: assert compare_metadata(MigrationContext.configure(connection), SCHEMA) == []
    for store in stores: store.close()

def test_a_server_that_is_away_is_a_sentence():
    pytest.importorskip('psycopg', reason='the driver psycopg is not installed')
    with pytest.raises(LabError, match='cannot be reached') as caught: Feedback('postgresql://lab:secret@127.0.0.1:1/db')
    assert 'secret' not in str(caught.value) and '\n' not in str(caught.value)
