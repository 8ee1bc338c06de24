"The widgets without a browser (messages as a browser sends them), and with one."
import contextlib, json, os, shutil, socket, sqlite3, subprocess, threading, time, urllib.request
from pathlib import Path
from types import SimpleNamespace
import pytest
from rlhf_lab.asking import add_item
from rlhf_lab.feedback import Feedback
from rlhf_lab.progress import progress
from rlhf_lab.runs import Run
from rlhf_lab.widgets import LabelWidget, TrainMonitor

root = Path(__file__).resolve().parent.parent

def click(button):
    "The message that a browser sends."
    button._handle_custom_msg({'event': 'click'}, [])

def asked(tmp_path, pairs: int = 3) -> Feedback:
    store = Feedback(tmp_path/'votes.db')
    for n in range(pairs): add_item(store, 'pair', [store.record(f'Question {n}', text, model='toy') for text in ('<img src=x> yes', 'no')])
    return store

def test_a_click_and_a_key_are_rows_of_the_store(tmp_path):
    store = asked(tmp_path)
    judging = LabelWidget(store, seed=3)
    first = judging.order
    assert '<img' not in judging.answers.children[0].value and '<img' not in judging.answers.children[1].value
    click(judging.buttons.children[1])
    judging.press('3'), judging.press('x'), judging.press('s')
    with sqlite3.connect(tmp_path/'votes.db') as db:
        rows = db.execute('select kind, payload, target_ids, ui from event order by id').fetchall()
        states = [row[0] for row in db.execute('select state from lease order by item_id')]
    assert [row[:2] for row in rows] == [('pair', '{"value":"b"}'), ('pair', '{"value":"both_good"}'), ('skip', '{}')]
    assert all(name in rows[0][2] for name in first) and '"tab":"notebook"' in rows[0][3] and f'"left_gen":"{first[0]}"' in rows[0][3]
    assert states == ['submitted', 'submitted', 'discarded'] and judging.item is None

def test_undo_withdraws_once_and_asks_again(tmp_path):
    store = asked(tmp_path, 1)
    judging = LabelWidget(store)
    order = judging.order
    judging.press('1'), judging.press('u'), judging.press('u')
    assert judging.order == order and judging.said == []
    judging.press('2')
    with sqlite3.connect(tmp_path/'votes.db') as db: kinds = [row[0] for row in db.execute('select kind from event order by id')]
    assert kinds == ['pair', 'withdraw', 'pair']

def test_a_single_answer_gets_a_thumb(tmp_path):
    store = Feedback(tmp_path/'votes.db')
    name = store.record('Q', 'A', model='toy')
    add_item(store, 'thumb', [name])
    LabelWidget(store).press('2')
    assert store.value(name) == 'down'

def test_the_monitor_draws_at_most_four_times_a_second_and_waits_a_hundred_times_as_long_as_a_drawing_took():
    drawn, monitor = [], TrainMonitor()
    plain = monitor.draw
    def draw():
        start = time.monotonic(); plain(); drawn.append((start, time.monotonic(), monitor.due))
    monitor.draw = draw
    def updates():
        start, n = time.monotonic(), 0
        while len(drawn) < 3 and time.monotonic() - start < 20: n += 1; time.sleep(.005); yield SimpleNamespace(step=n), {f'm{i}': n*i for i in range(8)}
    for _ in monitor(updates()): pass
    assert len(drawn) >= 3
    for (start, end, due), (following, _, _) in zip(drawn, drawn[1:-1]): # the last one is the figure that stays
        assert following >= due and due - start >= .25

def test_pause_waits_for_go_on():
    monitor = TrainMonitor()
    updates = ((SimpleNamespace(step=n), {'loss': 1/n}) for n in range(1, 4))
    watched = monitor(updates)
    next(watched)
    monitor.pause.value = True
    threading.Timer(.3, lambda: setattr(monitor.pause, 'value', False)).start()
    start = time.monotonic()
    assert len(list(watched)) == 2 and time.monotonic() - start > .25

def test_stop_reaches_a_trainer_through_its_folder_and_leaves_nothing_there(tmp_path):
    run, seen = Run(tmp_path/'run'), []
    with TrainMonitor(tmp_path/'run') as monitor, run:
        for n in progress(range(1, 100), run=run):
            run.log(n, {'loss': 1/n})
            seen.append(n)
            if n == 4: click(monitor.stop)
    assert seen == [1, 2, 3, 4] and len(monitor.rows) == 4
    assert not (tmp_path/'run/stop').exists() and not (tmp_path/'run/pause').exists()

@contextlib.contextmanager
def chromium(outside: list):
    "A page of a real browser; what it asks of other machines is added to the list."
    found = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
    if not found: pytest.skip('no chromium here')
    api = pytest.importorskip('playwright.sync_api')
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1200, height=950))
        page.on('request', lambda r: None if r.url.startswith(('http://127.0.0.1', 'file:', 'data:', 'blob:')) else outside.append(r.url))
        yield page
        browser.close()

@pytest.mark.slow
def test_what_a_notebook_keeps_is_static(tmp_path):
    import nbformat
    from nbclient import NotebookClient
    cells = ['from types import SimpleNamespace as S\nfrom rlhf_lab.widgets import TrainMonitor\nm = TrainMonitor()\n'
        'for _ in m((S(step=n), {"loss": 1/n}) for n in range(1, 50)): pass']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={'kernelspec': {'name': 'python3', 'display_name': 'Python 3'}})
    NotebookClient(nb, timeout=200, store_widget_state=False, resources={'metadata': {'path': str(root)}}).execute()
    kinds = [set(o['data']) for o in nb.cells[0].outputs if o.output_type == 'display_data']
    assert kinds == [{'image/png', 'text/plain'}, {'text/html', 'text/plain'}], kinds
    assert 'widget-view' not in nbformat.writes(nb)
    from nbconvert import HTMLExporter
    (tmp_path/'page.html').write_text(HTMLExporter().from_notebook_node(nb)[0])
    outside = []
    with chromium(outside) as page:
        page.route('http*://**', lambda route: route.abort()) # MathJax and require.js, which the template of nbconvert wants
        page.goto((tmp_path/'page.html').as_uri())
        assert page.locator('.jp-OutputArea-output img').evaluate('i => i.naturalWidth') > 200
        assert page.locator('.jp-OutputArea-output td').all_inner_texts()[:2] == ['loss', '1']
        if (folder := os.environ.get('RLHF_LAB_SHOTS')): page.screenshot(path=f'{folder}/static.png')
    assert all('cdnjs' in url for url in outside), outside

LABEL = """from rlhf_lab.feedback import Feedback
from rlhf_lab.widgets import LabelWidget
LabelWidget(Feedback('votes.db'), seed=0)"""
TRAIN = """from flax import nnx
from rlhf_lab.ppo import ActorCritic, PPOConfig, practise
from rlhf_lab.train import adamw, init_state
from rlhf_lab.widgets import StepDebugger, TrainMonitor
from rlhf_lab.world import World
world, optimizer, monitor = World(), adamw(1e-2), TrainMonitor()
toy = PPOConfig(batch_size=64, minibatches=1, max_new_tokens=3, kl_coef=world.beta, kl_stop=0., precision='float32')
state = init_state(ActorCritic(world.reference), optimizer, wrt=nnx.Param)
for state, _, rollout in monitor(practise(state, world.reference, [[0]]*64*9000, world.reward, optimizer, toy, write=world.write)): pass
print('ended', 'at', len(monitor.rows))
StepDebugger(state, rollout, toy).box"""

@contextlib.contextmanager
def jupyterlab(folder: Path, cells: list):
    "A JupyterLab with one notebook; its address."
    lab = os.environ.get('JUPYTER_LAB') or shutil.which('jupyter-lab')
    if not lab: pytest.skip('no JupyterLab here: pip install jupyterlab, or let JUPYTER_LAB name the program of another environment')
    kernel = dict(kernelspec=dict(name='python3', display_name='Python 3'))
    made = [dict(cell_type='code', id=f'c{n}', metadata={}, source=source, outputs=[], execution_count=None) for n, source in enumerate(cells)]
    (folder/'try.ipynb').write_text(json.dumps(dict(cells=made, metadata=kernel, nbformat=4, nbformat_minor=5)))
    (quiet := folder/'settings/@jupyterlab/apputils-extension').mkdir(parents=True)
    (quiet/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'} | dict(JUPYTER_CONFIG_DIR=str(folder/'config'), JUPYTER_DATA_DIR=str(folder/'data'),
        JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'), PYTHONPATH=str(root))
    with open(folder/'log', 'w') as log:
        server = subprocess.Popen([lab, '--no-browser', f'--port={port}', '--IdentityProvider.token=', '--allow-root', f'--ServerApp.root_dir={folder}'],
            env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError): urllib.request.urlopen(f'http://127.0.0.1:{port}/api'); break
            time.sleep(.5)
        yield f'http://127.0.0.1:{port}/lab/tree/try.ipynb?reset'
    finally: server.terminate(); server.wait(20)

@pytest.mark.slow
def test_in_a_real_jupyterlab_clicks_and_keys_arrive_even_while_a_cell_trains(tmp_path):
    asked(tmp_path)
    shots, outside = os.environ.get('RLHF_LAB_SHOTS'), []
    def rows():
        with sqlite3.connect(tmp_path/'votes.db') as db: return [row[0] for row in db.execute('select payload from event order by id')]
    with jupyterlab(tmp_path, [LABEL, TRAIN]) as address, chromium(outside) as page:
        def wait(good):
            for _ in range(150):
                if good(): return
                page.wait_for_timeout(200)
            raise AssertionError('waited in vain')
        def run(n):
            page.locator('.jp-Notebook .jp-CodeCell').nth(n).locator('.jp-InputPrompt').click()
            page.get_by_role('menuitem', name='Run', exact=True).click()
            page.locator('.lm-Menu-item[data-command="runmenu:run"]').click()
        press = lambda name: page.locator('button.jupyter-button').filter(has_text=name).click()
        page.goto(address, timeout=120_000)
        page.locator('.jp-Notebook-ExecutionIndicator[data-status=idle]').first.wait_for(timeout=120_000)
        page.wait_for_timeout(2000) # the menu answers a little later
        run(0)
        page.get_by_text('keys: 1').wait_for(timeout=60_000)
        press('A better'); wait(lambda: len(rows()) == 1)
        page.get_by_text('1 judged').wait_for()
        page.keyboard.press('2'); wait(lambda: len(rows()) == 2)
        assert rows() == ['{"value":"a"}', '{"value":"b"}']
        page.get_by_text('2 judged').wait_for()
        if shots: page.wait_for_timeout(800); page.locator('.rlhf-label').screenshot(path=f'{shots}/label.png')
        run(1)
        line = page.get_by_text(' s · ')
        line.filter(has_text='learning').wait_for(timeout=180_000)
        page.locator('img.plot').nth(3).wait_for(timeout=60_000)
        press('Pause')
        line.filter(has_text='paused').wait_for()
        page.wait_for_timeout(500)
        before = line.inner_text(); page.wait_for_timeout(1500)
        assert line.inner_text() == before
        if shots: page.locator('.jp-OutputArea').filter(has=page.locator('img.plot')).last.screenshot(path=f'{shots}/monitor.png')
        press('Go on')
        step = int(before.split()[1])
        wait(lambda: int(line.inner_text().split()[1]) > step)
        press('Stop')
        page.get_by_text('ended at').last.wait_for(timeout=60_000)
        page.get_by_text('1 of 15').wait_for(timeout=120_000)
        press('Next')
        page.get_by_text('2 of 15').wait_for()
        assert page.locator('img.plot').count() == 0 and page.locator('.jp-OutputArea-output img').count() == 1 # a picture where the widget was
    assert outside == []
