"The engine under load: L4, L6 and L7 of the reliability list, in small."
import asyncio, threading, time
import jax, pytest
from rlhf_lab.core import LabError
from rlhf_lab.generate import stream
from rlhf_lab.model import ModelConfig, Transformer
from rlhf_lab.serve import Engine, Request, follow, listen

config = ModelConfig(50, 16, 1, 2, 1, 8, 32, max_length=256)
first, second = (Transformer(config, key=jax.random.key(seed)) for seed in (0, 1))

def alone(request, model=first):
    return list(stream(model, list(request.prompt), key=jax.random.key(request.seed), max_new_tokens=request.max_new_tokens, temperature=request.temperature))

def until(said, seconds=60.):
    "Wait until something is true; how long it took."
    start = time.monotonic()
    while not said():
        assert time.monotonic() - start < seconds, 'waited in vain'
        time.sleep(.002)
    return time.monotonic() - start

def idle(engine): return not engine.waiting and not any(rows.busy for rows in engine.every)

def test_L4_fifty_abandoned_streams_leave_an_idle_engine():
    engine = Engine(dict(m=first), limit=50, pause=0.)
    list(listen(engine, Request('m', (1, 2), max_new_tokens=2))) # compiled
    answers = [engine.submit(Request('m', (1, 2, n), n, 240), lambda answer: None) for n in range(50)]
    until(lambda: answers[0].tokens)
    rows, steps = engine.models['m'], engine.models['m'].count
    for answer in answers: answer.stop()
    written, steps = [len(answer.tokens) for answer in answers], rows.count
    assert until(lambda: idle(engine)) < 1
    assert rows.count - steps <= 1 and rows.answers == [None]*4
    until(lambda: all(answer.finish for answer in answers))
    assert {answer.finish for answer in answers} == {'stopped'}
    assert all(len(answer.tokens) - n <= 1 for answer, n in zip(answers, written))
    steps = rows.count
    time.sleep(.2)
    assert rows.count == steps # nobody asked, nothing is computed
    request = Request('m', (4, 5), 3, 6)
    *_, answer = listen(engine, request)
    assert answer.tokens == alone(request) and engine.ready()

def test_L6_twenty_answers_under_a_model_swap_are_each_from_one_model():
    engine = Engine(dict(m=(first, 'first')), limit=50, pause=0.)
    requests = [Request('m', (3, n), n, 25) for n in range(20)]
    answers = [engine.submit(request, lambda answer: None) for request in requests]
    until(lambda: sum(bool(answer.finish) for answer in answers) >= 5)
    engine.replace('m', second, 'second')
    until(lambda: all(answer.finish for answer in answers))
    assert {answer.badge for answer in answers} == {'first', 'second'}
    for answer in answers: assert answer.tokens == alone(answer.request, dict(first=first, second=second)[answer.badge])
    until(lambda: not engine.leaving) # the old weights are let go

def test_L7_twenty_sessions_hear_only_their_own_answer():
    engine, heard = Engine(dict(a=first, b=first), limit=50, pause=.02), {}
    requests = [Request('ab'[n%2], tuple(range(n, n + 5)), n, 20) for n in range(20)]
    async def session(n):
        times = []
        async for answer in follow(engine, requests[n]):
            assert answer.request is requests[n]
            times.append(time.monotonic())
        heard[n] = list(answer.tokens), times
    async def everybody(): await asyncio.gather(*map(session, range(20)))
    asyncio.run(everybody())
    said = [heard[n][0] for n in range(20)]
    assert said == [alone(request) for request in requests] and len(set(map(tuple, said))) == 20 # so a mix-up would be seen

def test_news_come_no_more_often_than_asked_for():
    engine = Engine(dict(m=first), pause=.1)
    start = time.monotonic()
    news = [time.monotonic() for _ in listen(engine, Request('m', (1, 2), max_new_tokens=200))]
    assert len(news) <= (time.monotonic() - start)/.1 + 2

def test_a_page_that_is_closed_stops_its_answer():
    engine = Engine(dict(m=first), pause=0.)
    async def leave():
        async for answer in follow(engine, Request('m', (1, 2), max_new_tokens=240)):
            if answer.tokens: return answer
    answer = asyncio.run(leave())
    until(lambda: answer.finish)
    assert answer.finish == 'stopped' and len(answer.tokens) < 240

def test_what_breaks_fails_for_those_it_concerns_and_the_engine_goes_on():
    engine = Engine(dict(good=first, bad=first), pause=0.)
    engine.models['bad'].read = lambda: 1/0
    with pytest.raises(ZeroDivisionError): list(listen(engine, Request('bad', (1, 2))))
    *_, answer = listen(engine, Request('good', (1, 2), 0, 4))
    assert answer.tokens == alone(answer.request)

def test_an_engine_that_hangs_is_not_ready():
    engine, hang = Engine(dict(m=first), pause=0.), threading.Event()
    assert engine.ready()
    engine.models['m'].step = hang.wait
    engine.submit(Request('m', (1,)), lambda answer: None)
    assert not engine.ready(.3)
    del engine.models['m'].step # or it would turn round and round for ever
    hang.set()
    assert engine.ready()

def test_a_full_queue_says_so_at_once():
    engine = Engine(dict(m=first), limit=2, pause=0.)
    with engine.change:
        for n in range(2): assert engine.submit(Request('m', (1,), n, 3), lambda answer: None).place == n + 1
        with pytest.raises(LabError, match='2 people are waiting already'): engine.submit(Request('m', (1,)), lambda answer: None)
