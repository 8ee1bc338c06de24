"The app from outside: what it serves, what it refuses, and a person's visit in a real browser."
import asyncio, contextlib, json, queue, re, shutil, socket, subprocess, sys, tarfile, threading, time
from pathlib import Path
import httpx, pytest, sqlalchemy, uvicorn
from fastapi.testclient import TestClient
from starlette.routing import Route
from rlhf_lab import answers as talk, app as lab, chat
from rlhf_lab.answers import COMMAND, STAGES, inert, within
from rlhf_lab.asking import add_item
from rlhf_lab.core import LabError
from rlhf_lab.feedback import Feedback
from rlhf_lab.first import Served
from rlhf_lab.runs import cache_dir
from rlhf_lab.workshop import Workshop

HOSTILE = '''<script>window.ran = 1</script><img src=http://evil.example/a.png onerror="window.ran = 2">
![md](http://evil.example/b.png)
[link](javascript:window.ran=3) <a href="data:text/html,x">d</a> <svg onload="window.ran=4"></svg>
<iframe src=http://evil.example/c></iframe>
<form action=http://evil.example/d><input name=q></form>
<div style="position:fixed;inset:0;background:url(http://evil.example/e.png)">over</div>

# Heading
<video src=http://evil.example/f.mp4 autoplay></video>
<audio src=http://evil.example/g.mp3></audio><style>@import "http://evil.example/h.css";</style>
<details open ontoggle="window.ran=5">x</details><x-y onclick=1></x-y><base href=http://evil.example/>
<meta http-equiv=refresh content="0;url=http://evil.example/i">
http://evil.example/auto [ref][r] $\\href{http://evil.example/j}{x}$ ${window.ran=6} {{value}} `code` </div></div>

[r]: http://evil.example/k
```mermaid
graph TD; A-->B
```
end of the answer'''

class Toy:
    "Four models whose words need no weights; those that the X-ray reads are tiny."
    gone, writing = (), 0
    says = {'base': HOSTILE, 'sft': 'It is a good film, I think.', 'ppo': 'Wonderful. Wonderful. Wonderful.',
        'dpo': 'Quiet, and very funny.'}
    def __init__(self, folder = None): self.folder = folder # Of a tiny model
    def missing(self, stage): return COMMAND if stage in self.gone or stage not in STAGES else ''
    def load(self, stage):
        import jax
        from rlhf_lab.model import Transformer
        from rlhf_lab.weights import load_model
        model, tokenizer = load_model(self.folder)
        return Transformer(model.config, key=jax.random.key(list(STAGES).index(stage))), tokenizer, stage
    def answer(self, stage, prompt, *, seed, temperature, max_new_tokens):
        if prompt == 'break': raise LabError(f'no <b>room</b> for {stage}')
        if prompt == 'crash': raise KeyError('secret')
        yield dict(prompt=[{'role': 'user', 'content': prompt}], model=stage, run='toy')
        words = self.says[stage].split(' ') if prompt != 'forever' else ['word']*10_000
        Toy.writing += 1
        try:
            for n in range(len(words)):
                time.sleep(.002 if prompt != 'forever' else .02)
                yield ' '.join(words[:n + 1])
        finally: Toy.writing -= 1

@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('app')

@pytest.fixture(scope='module')
def store(place): return Feedback(place/'votes.db')

@pytest.fixture(scope='module')
def app(store, toy): return lab.build(Toy(toy), store)[0]

@pytest.fixture(scope='module')
def who(store): return store.session(consent='test')

@pytest.fixture
def client(app): return TestClient(app, raise_server_exceptions=False)

def call(client, target, *data, queued=False):
    "Run the event of a button, or of loading the page, as any program on the network could."
    config = client.get('/config').json()
    named = {part['id']: part['props'].get('elem_id') for part in config['components']}
    index = next(event['id'] for event in config['dependencies'] if len(event['inputs']) == len(data)
        for part, kind in event['targets'] if target in (named.get(part), kind))
    body = {'data': list(data), 'fn_index': index, 'session_hash': 'abc'}
    if not queued: return client.post('/gradio_api/run/predict', json=body)
    client.post('/gradio_api/queue/join', json=body).raise_for_status()
    with client.stream('GET', '/gradio_api/queue/data', params=dict(session_hash='abc')) as said:
        heard = []
        for line in said.iter_lines():
            heard.append(line)
            if 'process_completed' in line: return '\n'.join(heard)

# What is served

def test_the_page_is_served_and_knows_all_four(client):
    page = client.get('/')
    assert page.status_code == 200 and all(f'answer-{stage}' in page.text for stage in STAGES)

@pytest.mark.parametrize('request_line', ['GET /', 'GET /config', 'GET /theme.css', 'GET /nothing', 'GET /docs',
    'GET /gradio_api/info', 'GET /gradio_api/file=/etc/passwd', 'POST /gradio_api/run/predict',
    'GET /gradio_api/queue/data', 'PUT /'])
def test_every_reply_carries_the_headers(client, request_line):
    headers = client.request(*request_line.split()).headers
    assert {name: headers.get(name) for name in lab.HEADERS} == lab.HEADERS

def test_a_crash_is_a_500_without_its_story(app, client):
    app.routes.insert(0, Route('/bang', lambda request: {}['secret']))
    reply = client.get('/bang')
    assert reply.status_code == 500 and 'secret' not in reply.text
    assert {name: reply.headers.get(name) for name in lab.HEADERS} == lab.HEADERS

def test_no_file_leaves_the_machine(client, store):
    for path in (store.path, '/etc/passwd', Path(lab.__file__)):
        assert client.get(f'/gradio_api/file={path}').status_code in (403, 404)

def test_nothing_is_offered_to_programs(client):
    assert client.get('/gradio_api/info').json() == {'named_endpoints': {}, 'unnamed_endpoints': {}}
    assert client.get('/docs').status_code == client.get('/openapi.json').status_code == 404

# What is refused

@pytest.mark.parametrize('ids',
    [{}, None, 'x', [1], {'base': 1}, {'sft': '01M000000000000000000000A'},
        {'sft': {'$ne': 1}}, {'sft': "' OR 1=1 --"}])
def test_a_vote_on_an_unknown_answer_is_refused_and_writes_nothing(client, store, who, ids):
    before = store.read('SELECT count(*) AS n FROM event')
    reply = call(client, 'up-sft', 'Like', ids, who)
    assert reply.status_code == 200 and 'Not saved' in reply.text
    assert store.read('SELECT count(*) AS n FROM event') == before

@pytest.mark.parametrize('nobody', ['', None, 'f'*32, 7, ['x']])
def test_who_has_not_agreed_cannot_vote(client, store, nobody):
    ids = {'sft': store.record('Hi', 'Hello!', model='sft')}
    before = store.read('SELECT count(*) AS n FROM event')
    assert 'Not saved' in call(client, 'up-sft', 'Like', ids, nobody).text
    assert store.read('SELECT count(*) AS n FROM event') == before

def test_a_vote_sets_what_the_person_saw(client, store, who):
    ids = {'sft': store.record('Hi', 'Hello!', model='sft')}
    for label, now in (('Like', 'up'), ('Like', 'up'), ('Liked ✓', 'none'), ('Liked ✓', 'none')):
        assert call(client, 'up-sft', label, ids, who).status_code == 200 and store.value(ids['sft'], who) == now
    assert store.read('SELECT count(*) AS n FROM event WHERE subject = :subject', subject=f'thumb {ids["sft"]}') == [{'n': 2}]

def test_ids_from_a_browser_are_not_believed(client, who):
    reply = call(client, 'load', {'sft': '../../etc/passwd', 'evil': 'x'}, who).json()
    assert 'The answer will appear here' in str(reply['data'])
    assert 'root' not in call(client, 'refresh', '../../../etc').text

def test_everybodys_votes_and_exports_take_the_token_when_others_can_reach_the_lab(client, store, who, monkeypatch):
    monkeypatch.setenv('RLHF_LAB_HOST', '0.0.0.0')
    tries = [('everybody', True, [], [], '', 'guess', who), ('moderate', None, 'hide', 'guess')]
    for known in ('', 'right'*6):
        monkeypatch.setenv('RLHF_LAB_ADMIN', known)
        for one in tries: assert inert('admin token') in call(client, *one).text, one
        assert inert('admin token') in call(client, 'freeze', ['unpaired'], '', 'all', 'train', 'guess').text
    assert inert('admin token') not in call(client, 'everybody', True, [], [], '', 'right'*6, who).text
    assert store.read('SELECT * FROM dataset_version') == []

# Answers

def converse(store, prompt, models=None, halt=None, who=None):
    how, who = dict(seed=0, temperature=1., max_new_tokens=999), store.session() if who is None else who
    async def run():
        answers = {}
        said = talk.converse(models or Toy(), talk.Engine(), store, prompt, how, halt or threading.Event(), who, pause=.01)
        async for changed in said: answers.update(changed)
        return answers
    return asyncio.run(run())

def test_all_columns_move_together(store):
    order = queue.SimpleQueue()
    engine = talk.Engine()
    for stage in STAGES:
        engine.submit((time.sleep(.005) for _ in range(5)), lambda piece, stage=stage: order.put(stage))
    stages = [order.get(timeout=5) for _ in range(20)]
    assert all(abs(stages[:8].count(stage) - 2) <= 1 for stage in STAGES)

def test_a_missing_model_says_what_to_run_and_the_others_answer(store):
    toy = Toy(); toy.gone = ('ppo',)
    answers = converse(store, 'Hi', toy)
    assert (answers['ppo'].state, answers['ppo'].note) == ('missing', COMMAND)
    assert [answers[stage].state for stage in ('base', 'sft', 'dpo')] == ['done']*3
    assert inert(COMMAND) in chat.card('ppo', answers['ppo'])

def test_no_model_at_all_is_a_sentence(tmp_path, store):
    answers = converse(store, 'Hi', talk.Models(tmp_path, str(tmp_path/'nowhere')))
    assert [a.state for a in answers.values()] == ['failed', 'missing', 'missing', 'missing']
    assert 'nowhere' in answers['base'].note and '\n' not in answers['base'].note

def test_errors_are_sentences_and_secrets_stay(store, capsys):
    answers = converse(store, 'break')
    assert '&#60;b&#62;room' in chat.card('sft', answers['sft'])
    answers = converse(store, 'crash')
    assert 'secret' not in answers['sft'].note and 'KeyError' in answers['sft'].note
    assert 'secret' in capsys.readouterr().err

def test_a_store_that_cannot_write_costs_the_vote_only(tmp_path):
    store = Feedback(tmp_path/'votes.db')
    who = store.session()
    sqlalchemy.event.listen(store.engine, 'begin', lambda connection: connection.exec_driver_sql('PRAGMA query_only = 1'))
    answers = converse(store, 'Hi', who=who)
    assert answers['sft'].text == Toy.says['sft'] and 'Not saved' in answers['sft'].note and not answers['sft'].id
    assert 'Not saved' in chat.card('sft', answers['sft']) and not chat.thumb(answers['sft'], 'up')['visible']

def test_nothing_is_kept_of_whoever_has_not_agreed(store):
    before = store.read('SELECT count(*) AS n FROM generation')
    answers = converse(store, 'A secret', who='')
    assert answers['sft'].text == Toy.says['sft'] and not answers['sft'].id
    assert store.read('SELECT count(*) AS n FROM generation') == before

def test_stop_keeps_what_was_written(store):
    halt = threading.Event()
    threading.Timer(.3, halt.set).start()
    answers = converse(store, 'forever', halt=halt)
    kept = store.generation(answers['dpo'].id)
    assert kept['finish_reason'] == 'stopped' and kept['completion'].startswith('word')

def test_an_answer_that_ends_at_once_can_be_voted_on(store):
    toy = Toy(); toy.says = dict.fromkeys(STAGES, '')
    class Silent(Toy):
        def answer(self, stage, prompt, **_): yield dict(prompt=prompt, model=stage)
    answers = converse(store, 'Hi', Silent())
    assert '(the model ended immediately)' in chat.card('sft', answers['sft']) and store.vote(answers['sft'].id, 'down')

# The arena

NAMES = r'(?i)\b(base|sft|ppo|dpo)\b'

def test_before_the_vote_nothing_says_who_wrote_what(address, store, who, monkeypatch):
    monkeypatch.setitem(Toy.says, 'base', 'It is a film.') # and not a tag of that name
    with httpx.Client(base_url=address, timeout=20) as client:
        raw = call(client, 'fight', 'Who are you?', .7, 64, 0, who, queued=True)
        fought = store.read('SELECT * FROM battle ORDER BY created DESC LIMIT 1')[0]
        assert not re.search(NAMES, raw) and 'process_completed' in raw
        assert not any(secret in raw for secret in (fought['id'], fought['left_gen'][-6:], fought['right_gen'][-6:]))
        assert 'Not saved' in call(client, 'vote-a', None, 'cannot tell', store.session()).text # somebody else's battle
        told = call(client, 'vote-a', None, 'cannot tell', who).text
        assert len(re.findall(NAMES, told)) >= 2 and 'Saved' in told
        assert 'Not saved' in call(client, 'vote-b', None, 'cannot tell', who).text # one battle, one vote
    vote = store.last(' '.join(['choice', *sorted((fought['left_gen'], fought['right_gen']))]))
    ui = json.loads(vote['ui'])
    assert (vote['kind'], json.loads(vote['payload'])) == ('pair', {'value': 'a'}) and json.loads(vote['target_ids']) == [fought['left_gen'], fought['right_gen']]
    assert ui['blind'] and ui['left_p'] == .5 and 0 < ui['pair_p'] <= 1 and ui['latency_ms'] >= 0

def test_numbers_from_a_browser_are_brought_into_range():
    assert [within(n, 1, 512) for n in (10**9, -3, None, 64.)] == [512, 1, 1, 64]

def test_too_many_streams_are_refused_in_words():
    engine, block = talk.Engine(limit=1), threading.Event()
    engine.submit(iter(block.wait, None), print)
    with pytest.raises(LabError, match='ask again'): engine.submit(iter([]), print)

# The door

def test_sharing_is_refused_and_a_taken_port_named(monkeypatch, capsys):
    monkeypatch.setenv('RLHF_LAB_SHARE', 'true')
    with pytest.raises(LabError, match='never shared'): lab.address()
    monkeypatch.setenv('RLHF_LAB_SHARE', 'false')
    with socket.create_server(('127.0.0.1', 0)) as taken:
        monkeypatch.setenv('RLHF_LAB_PORT', str(port := taken.getsockname()[1]))
        with pytest.raises(LabError, match=f'{port}.*another port'): lab.address()
    monkeypatch.setenv('RLHF_LAB_HOST', '0.0.0.0')
    with pytest.raises(LabError, match='RLHF_LAB_ADMIN'): lab.address()
    monkeypatch.setenv('RLHF_LAB_ADMIN', 'short')
    with pytest.raises(LabError, match='RLHF_LAB_ADMIN'): lab.address()
    monkeypatch.setenv('RLHF_LAB_ADMIN', 'x'*22)
    lab.address()
    assert 'everyone who can reach' in capsys.readouterr().err

# A visit

@contextlib.contextmanager
def listening(app):
    with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host='127.0.0.1', port=port, log_level='error'))
    thread = threading.Thread(target=server.run, daemon=True); thread.start()
    while not server.started: time.sleep(.05)
    yield f'http://127.0.0.1:{port}/'
    server.should_exit = server.force_exit = True; thread.join(5)

@pytest.fixture(scope='module')
def address(app):
    with listening(app) as address: yield address

@pytest.fixture(scope='module')
def browser():
    found = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
    if not found: pytest.skip('no chromium here')
    from playwright.sync_api import sync_playwright
    flags = ('headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking '
        'disable-component-update disable-sync').split()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[f'--{flag}' for flag in flags])
        yield browser
        browser.close()

@pytest.fixture
def visit(browser, address):
    context = browser.new_context(viewport=dict(width=1280, height=800))
    page = context.new_page()
    page.asked, page.errors = [], []
    page.on('request', lambda request: page.asked.append(request.url))
    page.on('pageerror', lambda error: page.errors.append(str(error)))
    page.on('console', lambda said: page.errors.append(said.text) if said.type == 'error' else None)
    page.set_default_timeout(10_000)
    page.goto(address); page.wait_for_selector('#answer-dpo .card')
    page.click('#agree'); page.wait_for_selector('#notice', state='hidden')
    yield page
    assert not [url for url in page.asked if not url.startswith((address, 'data:', 'blob:'))], 'external requests'
    assert not page.errors
    context.close()

def ask(page, prompt):
    page.fill('#prompt textarea', prompt); page.click('#send')
    for stage in STAGES: page.wait_for_selector(f'#answer-{stage} .card.done')
    page.locator('#status', has_text='All answers are complete.').wait_for()

@pytest.mark.e2e
def test_a_person_asks_votes_comes_back_and_changes_their_mind(visit, store):
    prompt = 'Continue this film review: The plot'
    ask(visit, prompt)
    assert visit.inner_text('#answer-dpo .text') == Toy.says['dpo']
    visit.click('#up-dpo'); visit.wait_for_selector('#up-dpo.pressed')
    kept, = [vote for vote in Feedback(store.path).votes() if vote['prompt'] == prompt]
    assert [kept[name] for name in ('completion', 'model', 'run', 'value')] == [Toy.says['dpo'], 'dpo', 'toy', 'up']
    assert abs(kept['voted']/1e6 - time.time()) < 60 and json.loads(kept['sampling']) == dict(temperature=.7, max_new_tokens=64, seed=0)
    visit.reload()
    visit.wait_for_selector('#up-dpo.pressed') # the store remembers
    assert visit.input_value('#prompt textarea') == prompt
    visit.click('#down-dpo'); visit.wait_for_selector('#down-dpo.pressed')
    assert 'pressed' not in visit.get_attribute('#up-dpo', 'class')
    visit.click('#down-dpo'); visit.wait_for_selector('#down-dpo:not(.pressed)')
    assert not [vote for vote in store.votes() if vote['prompt'] == prompt]
    chain = store.read('SELECT kind, payload FROM event WHERE subject = :subject ORDER BY id', subject=f'thumb {kept["id"]}')
    assert [json.loads(one['payload']).get('value', one['kind']) for one in chain] == ['up', 'down', 'withdraw']

@pytest.mark.e2e
def test_hostile_text_is_only_text(visit):
    ask(visit, HOSTILE)
    assert visit.inner_text('#answer-base .text').split() == HOSTILE.split()
    bad = 'img, script, svg, iframe, form, video, audio, style, a, base, meta, h1, details, pre'
    assert visit.locator('#columns').locator(bad).count() == 0
    assert visit.evaluate('window.ran') is None
    visit.reload(); visit.wait_for_selector('#answer-base .card.done')
    assert visit.evaluate('window.ran') is None

@pytest.mark.e2e
def test_keys_ask_and_stop_and_a_phone_needs_no_sideways_scrolling(visit, store):
    visit.set_viewport_size(dict(width=320, height=700))
    visit.fill('#prompt textarea', 'forever'); visit.keyboard.press('Control+Enter')
    visit.wait_for_selector('#answer-sft .card.writing'); visit.wait_for_selector('#stop')
    visit.keyboard.press('Escape'); visit.wait_for_selector('#answer-sft .card.done')
    assert 'stopped' in visit.inner_text('#answer-sft')
    assert visit.evaluate('document.documentElement.scrollWidth') <= 320
    assert visit.get_attribute('#status', 'role') == 'status'

@pytest.mark.e2e
def test_an_example_can_be_asked_at_once(visit):
    visit.click('#send')
    visit.locator('#status', has_text='Write a prompt first.').wait_for()
    visit.click('#examples button >> nth=1'); visit.click('#send')
    for stage in STAGES: visit.wait_for_selector(f'#answer-{stage} .card.done')
    assert visit.input_value('#prompt textarea') == chat.EXAMPLES[1]

@pytest.mark.e2e
def test_leaving_the_page_stops_the_writing(browser, address):
    context = browser.new_context(); page = context.new_page(); page.goto(address)
    page.fill('#prompt textarea', 'forever'); page.click('#send'); page.wait_for_selector('#answer-sft .card.writing')
    assert Toy.writing == 4
    context.close()
    for _ in range(100):
        if not Toy.writing: break
        time.sleep(.1)
    assert Toy.writing == 0

@pytest.mark.e2e
def test_a_vote_goes_through_all_tabs(visit, store, monkeypatch):
    page, bad = visit, 'script, iframe, form, video, audio, svg, base, meta, b, details'
    tab = lambda name: page.get_by_role('tab', name=name).click()
    ask(page, HOSTILE)
    page.click('#down-base'); page.wait_for_selector('#why')
    page.click('#reasons >> text=off-topic'); page.fill('#better textarea', 'A <b>quiet</b> film.'); page.click('#save-why')
    page.locator('#status', has_text='a better answer, and why').wait_for()
    said = store.read('SELECT kind, payload, reason_codes FROM event ORDER BY id DESC LIMIT 2')
    assert [one['kind'] for one in said] == ['edit', 'thumb'] and json.loads(said[1]['reason_codes']) == ['off-topic']

    page.click('#watch'); page.wait_for_selector('#x-answer textarea')
    page.wait_for_function('document.querySelector("#x-answer textarea").value.length > 100')
    page.fill('#x-prompt textarea', 'What did you think of it?'); page.fill('#x-answer textarea', 'A <b>joy</b>, <img src=http://evil.example/x>.')
    page.click('#x-look'); page.wait_for_selector('#x-maps figure', timeout=60_000)
    assert page.locator('#x-maps figure').count() == 4 and page.locator('#x-maps').locator(f'img, {bad}').count() == 0
    assert '<b>joy</b>' in page.inner_text('#x-maps figure >> nth=0').replace('\n', '').replace(' ', '') or re.search('[+−][0-9]+[.][0-9]{2}', page.inner_text('#x-maps figure >> nth=0'))

    tab('Arena')
    monkeypatch.setitem(Toy.says, 'base', 'It is a film.') # and not a tag of that name
    page.fill('#duel-prompt textarea', 'Who is it? 1 2 s'); page.click('#fight'); page.wait_for_selector('#vote-a')
    assert not re.search(NAMES, page.inner_text('#duel') + page.inner_html('#duel') + page.inner_text('#ballot'))
    votes = lambda: store.read("SELECT count(*) AS n FROM event WHERE kind = 'pair'")[0]['n']
    before = votes()
    page.focus('#duel-prompt textarea'); page.keyboard.press('1') # somebody types
    page.click('#keys input'); page.evaluate('document.activeElement.blur()'); page.keyboard.press('1') # keys are off
    page.click('#keys input'); page.evaluate('document.activeElement.blur()'); page.keyboard.press('2'); page.keyboard.press('2')
    page.wait_for_selector('#reveal table')
    assert votes() == before + 1 and json.loads(store.read("SELECT payload FROM event WHERE kind = 'pair' ORDER BY id DESC LIMIT 1")[0]['payload'])['value'] == 'b'
    assert len(re.findall(NAMES, page.inner_text('#reveal'))) == 2

    tab('Feedback')
    page.wait_for_selector('#events table')
    shown = page.inner_text('#events')
    assert all(word in shown for word in ('off-topic', 'edit', 'pair')) and page.locator('#events').locator(f'img, {bad}').count() == 0
    page.click('#chosen input'); page.click('[role=option]:has-text("edit")'); page.wait_for_selector('#provenance .receipt')
    page.click('#withdraw'); page.locator('#votes-status', has_text='Taken back').wait_for()
    assert store.read('SELECT kind FROM event ORDER BY id DESC LIMIT 1') == [{'kind': 'withdraw'}]

    page.set_viewport_size(dict(width=390, height=800))
    for name in TABS:
        more = page.get_by_role('tab', name=name)
        if more.is_visible(): more.click()
        assert page.evaluate('document.documentElement.scrollWidth') <= 390, name
    assert page.evaluate('window.ran') is None

# For everybody: axe-core, as of npm; it is not part of this project

AXE = 'axe-core@4.11.0'
TABS = 'Chat', 'Arena', 'Label', 'Feedback', 'X-ray', 'Training', 'Models', 'About & privacy'

@pytest.fixture(scope='module')
def axe(tmp_path_factory):
    "The script that looks for what keeps people out."
    folder = cache_dir()/'axe'
    if not (found := folder/f'{AXE}.js').exists():
        place = tmp_path_factory.mktemp('axe')
        try:
            subprocess.run(['npm', 'pack', AXE, '--silent'], cwd=place, check=True, capture_output=True, timeout=60)
            script = tarfile.open(next(place.glob('*.tgz'))).extractfile('package/axe.min.js').read()
        except (OSError, subprocess.SubprocessError, StopIteration, KeyError) as error: pytest.skip(f'{AXE} cannot be had from npm: {error!r:.80}')
        folder.mkdir(parents=True, exist_ok=True); found.write_bytes(script)
    return found.read_text(encoding='utf-8')

@pytest.mark.e2e
def test_u1_no_tab_keeps_anybody_out(visit, store, axe):
    add_item(store, 'pair', [store.record('Which?', text, model='sft') for text in ('This.', 'That.')])
    visit.set_viewport_size(dict(width=1600, height=900))
    visit.evaluate(axe)
    found = []
    for scheme in ('light', 'dark'):
        visit.evaluate('dark => document.body.classList.toggle("dark", dark)', scheme == 'dark')
        for name in TABS:
            visit.get_by_role('tab', name=name, exact=True).click()
            visit.wait_for_function('() => !document.querySelector(".pending")')
            if name == 'Label': visit.wait_for_selector('#label-question .question')
            said = visit.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
            found += [f'{name}, {scheme}: {one["id"]} ({one["impact"]}) {node["target"]} {node["html"][:160]} {node["failureSummary"][:200]}' for one in said['violations']
                if one['impact'] in ('serious', 'critical') for node in one['nodes']]
    assert not found, '\n'.join(found)

@pytest.mark.e2e
def test_a_first_visit_without_checkpoints_base_model_or_network(browser, tmp_path, monkeypatch):
    work = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).mkdir(); print('PPO 3/10 · 3:54 left', flush=True); time.sleep(60)"
    shops = []
    monkeypatch.setattr(lab, 'Workshop', lambda run, base, store: shops.append(Workshop(run, base, lambda folder, kind, source: [sys.executable, '-c', work, str(folder)], store)) or shops[-1])
    app = lab.build(Served(tmp_path/'runs/quickstart', str(tmp_path/'nowhere')), Feedback(tmp_path/'votes.db'))[0]
    with listening(app) as address:
        context = browser.new_context(viewport=dict(width=390, height=800)); page = context.new_page()
        asked = []
        page.on('request', lambda request: asked.append(request.url)); page.set_default_timeout(20_000)
        page.goto(address)
        for stage in STAGES: page.wait_for_selector(f'#answer-{stage} .card.done .text')
        first = {stage: page.inner_text(f'#answer-{stage} .text') for stage in STAGES}
        assert len(set(first.values())) == 4 and 'recorded' in page.inner_text('#answer-dpo .facts')
        line = page.inner_text('#first-line')
        assert 'seed 0' in line and 'rlhf-lab quickstart' in line and COMMAND in line
        assert page.evaluate('document.documentElement.scrollWidth') <= 390
        prompt = page.input_value('#prompt textarea')
        page.click('#first-next'); page.wait_for_function('was => document.querySelector("#prompt textarea").value != was', arg=prompt)
        assert page.inner_text('#answer-dpo .text') != first['dpo']
        page.click('#send'); page.wait_for_selector('#answer-sft .card.failed') # no base model here
        assert 'nowhere' in page.inner_text('#answer-sft')
        page.click('#first-next'); page.wait_for_selector('#answer-sft .card.done')
        assert not page.is_visible('#up-dpo') # nobody has agreed
        page.click('#agree'); page.click('#up-dpo'); page.locator('#up-dpo', has_text='Liked').wait_for() # what was recorded can be judged, too
        page.reload(); page.locator('#up-dpo', has_text='Liked').wait_for()

        training = lambda: page.get_by_role('tab', name='Training').click()
        page.set_viewport_size(dict(width=1280, height=800)); training()
        page.wait_for_selector('#curves .plot'); page.wait_for_selector('#results .frontier')
        page.click('#train'); page.locator('#train-status', has_text='3:54 left').wait_for()
        page.reload(); page.wait_for_selector('#answer-dpo .card.done'); training()
        page.locator('#train-status', has_text='Training quickstart').wait_for() # it goes on without its page
        page.click('#train'); page.locator('#train-status', has_text='already').wait_for()
        page.click('#train-stop'); page.locator('#train-status', has_text='was stopped').wait_for()
        assert shops[0].process.wait(5) and not [url for url in asked if not url.startswith((address, 'data:', 'blob:'))]
        context.close()

@pytest.fixture
def checkpoints(toy):
    "Two of PPO, and what was measured of them."
    point = lambda method, step, kl: dict(method=method, step=step, kl=[kl]*4, gold=[.1*step]*4, reward=[.2*step]*4)
    for name, points in {'ppo': [point('ppo', 2, 3.), point('ppo', 4, 5.)], 'best-of-n': [point('sft', 0, 0.)]}.items():
        place = Path(f'{toy}-frontier')/name
        place.mkdir(parents=True); (place/'points.json').write_text(json.dumps(points))
    (Path(toy)/'ppo'/'adapters').mkdir(parents=True)
    for step in (2, 4): (Path(toy)/'ppo'/'adapters'/f'{step}.safetensors').touch()
    yield
    shutil.rmtree(Path(toy)/'ppo'); shutil.rmtree(f'{toy}-frontier')

@pytest.mark.e2e
def test_a_point_of_the_frontier_leads_to_the_chat_as_it_was(checkpoints, visit):
    visit.get_by_role('tab', name='Training').click()
    visit.wait_for_selector('#trails .plot')
    visit.get_by_role('button', name='PPO 2: 3 nats').click()
    visit.get_by_text('Settings, the same for all').click()
    visit.wait_for_selector('#moment-ppo input[type=number]')
    assert visit.input_value('#moment-ppo input[type=number]') == '2' and not visit.is_visible('#moment-dpo')

def test_training_takes_the_token_when_others_can_reach_the_lab(client, monkeypatch, tmp_path):
    monkeypatch.setattr(Workshop, 'start', lambda self, kind: pytest.fail('it trains'))
    monkeypatch.setattr(Workshop, 'stop', lambda self: pytest.fail('it stops'))
    monkeypatch.setenv('RLHF_LAB_HOST', '0.0.0.0'); monkeypatch.setenv('RLHF_LAB_ADMIN', 'right'*6)
    for one in (('train', 'full', 'guess'), ('train-stop', 'guess')): assert inert('admin token') in call(client, *one).text
