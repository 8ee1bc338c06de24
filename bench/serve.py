"How many tokens a second the engine writes for four people who ask at once, and one after the other."
import queue
from rlhf_lab.serve import Engine, Request
from timing import model_of, options, race, table

def main():
    args = options(__doc__)
    length, new = (16, 8) if args.tiny else (48, 32)
    model = model_of(args, 'float32')
    engine = Engine(dict(m=model), rows=4)
    requests = [Request('m', tuple(range(seed, seed + length)), seed, new) for seed in range(4)]
    def ask(together: int):
        "So many at once, until all four are done."
        for at in range(0, 4, together):
            inbox = queue.SimpleQueue()
            some = [engine.submit(request, inbox.put) for request in requests[at:at + together]]
            while not all(answer.finish for answer in some): inbox.get()
    variants = {'one after the other': lambda: ask(1), 'four at once': lambda: ask(4)}
    rows = race(dict(bench='serve', people=4, prompt=length, new=new), variants, args.repeats, 4*new)
    table(rows)

if __name__ == '__main__': main()
