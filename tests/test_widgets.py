"The widgets without a browser (messages as a browser sends them), and with one."
import sqlite3, threading, time
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
