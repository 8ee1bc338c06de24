"Preference losses, their gradients and whole trainings are those of TRL, HALOs and the DPO paper's own code."
import functools
import jax, jax.numpy as jnp, numpy as np, optax, pytest
from goldens import Saying, array, ask, close, double, each, exact, in_float64, load, rough, seeds, sides, tiny
from rlhf_lab import dpo
from rlhf_lab.core import Batch, LabError, Pairs
from rlhf_lab.dpo import (Thumbs, alpha_divergence, aot, apo_down, apo_zero, bco, cdpo, cpo_loss, discopop, dpo_loss, exo, forward_kl, hinge, ipo, js,
    kl_baseline, kto_loss, mismatched, nca, orpo_loss, pair_loss, reference_logprobs, robust, simpo_loss, sppo_hard, with_mismatches)
from rlhf_lab.model import score_tokens
from rlhf_lab.reward import bradley_terry
from rlhf_lab.train import fit, init_state, make_step

part = functools.partial

@pytest.mark.skipif(double, reason='this is the float64 run')
@pytest.mark.slow
def test_all_of_this_in_float64(): in_float64(__file__)

# ── from log-probabilities ──

@functools.cache
def stacked(name):
    "All seeds of a file with one width."
    z, names = load(name), seeds(name)
    keys = [key.removeprefix(f'{names[0]}/') for key in z if key.startswith(names[0]) and key.endswith(('ids', '_mask', 'logits', 'token_logps')) and 'grad' not in key]
    def stack(arrays):
        width = max(x.shape[1] for x in arrays)
        return np.stack([np.pad(array(x), [(0, 0), (0, width - x.shape[1])] + [(0, 0)]*(x.ndim - 2)) for x in arrays])
    return names, {key: stack([z[f'{seed}/{key}'] for seed in names]) for key in keys}

class Told:
    "A model that is told its log-probabilities: the batches carry them in `below`."
    def hidden(self, batch): return batch.below

@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(dpo, 'score_tokens', lambda model, batch, temperature=1., hidden=None: (jnp.where(batch.mask, batch.below, 0), None))

def now(data):
    "Decorates a function of one seed: its results for all of them."
    return lambda f: jax.jit(lambda data: jax.lax.map(f, data))(data)

def telling(pairs, logprobs):
    "The pairs, with the log-probabilities of their rows."
    a, b = jnp.split(logprobs, 2)
    return pairs.replace(chosen=pairs.chosen.replace(below=a), rejected=pairs.rejected.replace(below=b))

right = lambda x: jnp.pad(jnp.asarray(x), ((0, 0), (1, 0))) # the first token was never guessed

def paired_aot(loss=bradley_terry):
    return lambda model, pairs: pair_loss(model, pairs, part(aot, loss=loss, gap=.1*(pairs.ref_chosen - pairs.ref_rejected)))

FAMILY = {'sigmoid': dpo_loss, 'sigmoid_b05': part(dpo_loss, beta=.5), 'hinge': part(dpo_loss, loss=hinge), 'ipo': part(dpo_loss, loss=ipo, average=True),
    'robust_ls0.1': part(dpo_loss, loss=robust), 'robust_ls0.3': part(dpo_loss, loss=part(robust, flipped=.3)), 'exo_pair_ls0.001': part(dpo_loss, loss=exo),
    'nca_pair': part(pair_loss, loss=nca), 'bco_pair': part(pair_loss, loss=bco), 'sppo_hard': part(pair_loss, loss=sppo_hard), 'aot': paired_aot(), 'aot_ls0.1': paired_aot(cdpo),
    'aot_unpaired': part(pair_loss, loss=aot), 'apo_zero': part(pair_loss, loss=apo_zero), 'apo_down': part(pair_loss, loss=apo_down), 'discopop': part(dpo_loss, loss=discopop),
    'sft': part(pair_loss, loss=lambda chosen, rejected: 0*chosen, nll=1.), 'sigmoid_norm': part(dpo_loss, average=True), 'ld_dpo_0.5': part(dpo_loss, tail=.5),
    'fdpo_forward_kl': part(dpo_loss, link=forward_kl), 'fdpo_js': part(dpo_loss, link=js), 'fdpo_alpha0.5': part(dpo_loss, link=alpha_divergence)}

def test_the_family_is_complete():
    z = load('dpo_family')
    assert {key.split('/')[1] for key in z if key.endswith('/loss')} == set(FAMILY)

def test_the_family(told):
    "All 22 configurations of TRL, with their gradients, through `pair_loss` itself."
    z, (names, data) = load('dpo_family'), stacked('dpo_family')
    @now(data)
    def found(x):
        policy, reference, found = right(x['policy_per_token_logps']), right(x['ref_per_token_logps']), {}
        pairs = sides(jnp.zeros(policy.shape), x['completion_mask'])
        for name, loss in FAMILY.items():
            known = reference_logprobs(Told(), telling(pairs, reference), tail=.5 if name.startswith('ld_') else 1.)
            mean = lambda policy: (lambda total, weight, seen: (total/weight, seen))(*loss(Told(), telling(known, policy)))
            found[name] = jax.value_and_grad(mean, has_aux=True)(policy)
        return found
    for name, ((values, seen), grads) in found.items():
        tolerance = rough if name.startswith('exo') or name == 'fdpo_alpha0.5' else exact
        for s, seed in enumerate(names):
            close(values[s], z[f'{seed}/{name}/loss'], tolerance)
            expected = z[f'{seed}/{name}/grad_policy_per_token_logps']
            close(grads[s][:, 1:1 + expected.shape[1]], expected, tolerance)
            assert (np.asarray(grads[s])[data['completion_mask'][s] == 0] == 0).all()
            for key, (total, weight) in seen.items():
                if name == 'sigmoid' and f'{seed}/metrics/{key}' in z: close(total[s]/weight[s], z[f'{seed}/metrics/{key}'], 1e-6 if 'accuracies' in key else exact)

@pytest.mark.parametrize('seed', seeds('kto'))
def test_kto(seed, told):
    "TRL's losses, gradients and baseline, HALOs' losses; batches of one class, and baselines that had to be clamped."
    z, label = load('kto'), load('kto')[f'{seed}/label']
    given = {name: right(array(z[f'{seed}/{name}_per_token_logps'])) for name in ('policy', 'ref', 'kl_policy', 'kl_ref')}
    mask, other = z[f'{seed}/completion_mask'] > 0, z[f'{seed}/kl_completion_mask'] > 0
    rows = lambda mask, logprobs: Batch(jnp.zeros(mask.shape, int), jnp.asarray(mask), below=logprobs)
    total = lambda mask, logprobs: jnp.where(mask, logprobs, 0).sum(1)
    @part(jax.jit, static_argnums=2)
    @part(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(policy, mixed, name, up, down):
        thumbs = Thumbs(rows(mask, policy), label, total(mask, given['ref']), rows(other, mixed), total(other, given['kl_ref']))
        z = kl_baseline if name == 'kto' else lambda model, thumbs: 0.
        value, weight, seen = kto_loss(Told(), thumbs, .1, up, down, z)
        return value/weight, (kl_baseline(Told(), thumbs), seen)
    configs = sorted({key.split('/')[1] for key in z if key.endswith('/loss')})
    assert len(configs) == 3
    for config in configs:
        name, up, down = config.replace('_dw', ' ').replace('_uw', ' ').split()
        (value, (baseline, seen)), (slope, through) = loss(given['policy'], given['kl_policy'], name, float(up), float(down))
        close(value, z[f'{seed}/{config}/loss'])
        close(slope[:, 1:], z[f'{seed}/{config}/grad_policy_per_token_logps'])
        assert (through == 0).all() and all(jnp.isfinite(x) for pair in seen.values() for x in pair)
        if name == 'kto': close(baseline, z[f'{seed}/{config}/kl'])
        if (key := f'{seed}/{config}/halos_losses_chosen_then_rejected') in z: close(value, z[key].mean(), rough)
    assert bool(baseline == 0) == bool(z[f'{seed}/raw_kl_estimate_before_clamp'] <= 0)

# ── from logits ──

ROWS = {'dpo': (dpo_loss, ['mitchell/dpo_b0.1', 'halos/DPOTrainer']), 'cdpo': (part(dpo_loss, loss=part(cdpo, flipped=.2)), ['mitchell/cdpo_b0.1_ls0.2', 'halos/CDPOTrainer']),
    'ipo, summed': (part(dpo_loss, loss=ipo), ['mitchell/ipo_sum_b0.1']), 'ipo': (part(dpo_loss, loss=ipo, average=True), ['halos/IPOTrainer']),
    'simpo': (part(simpo_loss, beta=10., gamma=10*.3), ['halos/SimPOTrainer']), 'no reference': (part(cpo_loss, nll=0.), ['mitchell/dpo_reference_free'])}

def scored(x, logits):
    "The log-probabilities of all words, the prompt's as well."
    return score_tokens(Saying(logits), Batch(jnp.asarray(x['input_ids'], jnp.int32), x['attention_mask'] > 0))[0]

def found_from_logits(losses, data, name, grads):
    "For each seed and loss: what each pair costs, the slope of the sum by the logits where it is asked for, and the measurements."
    @now(data)
    def found(x):
        logprobs, pull = jax.vjp(lambda logits: scored(x, logits), x[name])
        pairs = sides(x['input_ids'], x['completion_mask'])
        if 'ref_logits' in x: pairs = reference_logprobs(Told(), telling(pairs, scored(x, x['ref_logits'])))
        def one(key, loss):
            weighed = lambda logprobs, weight: (lambda total, _, seen: (total, seen))(*loss(Told(), telling(pairs, logprobs).replace(weight=weight)))
            each, (slope, seen) = jax.vmap(lambda weight: weighed(logprobs, weight)[0])(jnp.eye(len(logprobs)//2)), jax.grad(weighed, has_aux=True)(logprobs, jnp.ones(len(logprobs)//2))
            return each, pull(slope)[0] if key in grads else slope, seen
        return {key: one(key, loss) for key, loss in losses.items()}
    return found

def test_pairs_from_logits(told):
    "Alignment, masks, sums and means over ragged rows, margins and gradients."
    z, (names, data) = load('dpo_peers_from_logits'), stacked('dpo_peers_from_logits')
    for name, (losses, grads, seen) in found_from_logits({name: loss for name, (loss, _) in ROWS.items()}, data, 'policy_logits', ['cdpo']).items():
        for s, seed in enumerate(names):
            close(jnp.stack([seen['logps/chosen'][0][s], seen['logps/rejected'][0][s]]), z[f'{seed}/policy_sum_logps'].reshape(2, -1).sum(1))
            for key in ROWS[name][1]: close(losses[s], z[f'{seed}/{key}/losses'])
            expected = z[f'{seed}/{ROWS["cdpo"][1][0]}/grad_policy_logits_of_mean']
            if name == 'cdpo': close(grads[s, :, :expected.shape[1]]/len(losses[s]), expected)
    different = found_from_logits({name: ROWS[name][0] for name in ('ipo', 'ipo, summed')}, data, 'policy_logits', [])
    assert np.abs(np.asarray(different['ipo'][0]) - different['ipo, summed'][0]).max() > .1 # R8

def test_dpo_in_one_go():
    "Hidden states, log-probabilities, reference, loss and slope together; none of it reaches prompt or padding."
    z, x = load('dpo_peers_from_logits'), {key: value[0] for key, value in stacked('dpo_peers_from_logits')[1].items()}
    @jax.jit
    def both(logits, reference):
        pairs = reference_logprobs(Saying(reference), sides(x['input_ids'], x['completion_mask']))
        return jnp.concatenate([pairs.ref_chosen, pairs.ref_rejected]), jax.value_and_grad(lambda logits: dpo_loss(Saying(logits), pairs, .1, ROWS['cdpo'][0].keywords['loss'])[0])(logits)
    ref, (total, grad) = both(x['policy_logits'], x['ref_logits'])
    close(ref, z['s0/ref_sum_logps'])
    close(total, z['s0/mitchell/cdpo_b0.1_ls0.2/losses'].sum())
    expected = z['s0/mitchell/cdpo_b0.1_ls0.2/grad_policy_logits_of_mean']
    close(grad[:, :expected.shape[1]]/4, expected)
    used = np.pad(x['completion_mask'][:, 1:] > 0, ((0, 0), (0, 1)))
    assert (np.asarray(grad)[~used] == 0).all() and (np.abs(grad).sum(-1)[used] > 0).all()

FREE = {'orpo_b0.1': part(orpo_loss, whole=True), 'orpo_b1.0': part(orpo_loss, odds=1., whole=True), 'cpo_sigmoid_b0.1_a1': cpo_loss, 'simpo_b2_g0.5_a0': part(simpo_loss, gamma=.5),
    'cpo_simpo_b2_g0.5_a1': part(simpo_loss, gamma=.5, nll=1.), 'cpo_ls0.1': part(cpo_loss, loss=cdpo, nll=0.), 'cpo_hinge': part(cpo_loss, loss=hinge, nll=0.),
    'cpo_ipo': lambda model, pairs: pair_loss(model, pairs, lambda chosen, rejected: ipo(chosen - rejected), average=True, reference=False)}

def test_losses_without_a_reference(told):
    "ORPO, CPO and SimPO of TRL, from logits; ORPO's imitation includes the prompt there."
    z, (names, data) = load('orpo_cpo_simpo'), stacked('orpo_cpo_simpo')
    assert {key.split('/')[1] for key in z if key.endswith('/loss')} == set(FREE)
    asked = [name for name in FREE if f's0/{name}/grad_logits' in z]
    assert len(asked) == 2
    @now(data)
    def found(x):
        (logprobs, pull), pairs = jax.vjp(lambda logits: scored(x, logits), x['logits']), sides(x['input_ids'], x['completion_mask'])
        mean = lambda loss: jax.value_and_grad(lambda logprobs: (lambda total, weight, _: total/weight)(*loss(Told(), telling(pairs, logprobs))))
        return {name: (lambda value, slope: (value, pull(slope)[0] if name in asked else slope))(*mean(loss)(logprobs)) for name, loss in FREE.items()}
    for name, (values, grads) in found.items():
        for s, seed in enumerate(names):
            close(values[s], z[f'{seed}/{name}/loss'], rough if name.startswith('orpo') else exact)
            if name in asked: close(grads[s, :, :z[f'{seed}/{name}/grad_logits'].shape[1]], z[f'{seed}/{name}/grad_logits'], rough)

def test_the_paper_imitates_the_answer_only(told):
    x = {key: value[0] for key, value in stacked('dpo_family')[1].items()}
    pairs, logprobs, mask = sides(jnp.zeros(x['completion_mask'].shape), x['completion_mask']), right(x['policy_per_token_logps']), x['completion_mask'] > 0
    for whole in (False, True):
        grad = np.asarray(jax.jit(jax.grad(lambda logprobs: orpo_loss(Told(), telling(pairs, logprobs), whole=whole)[0]))(logprobs))
        before = np.cumsum(mask, 1) == 0
        before[:, 0] = before[5:] = False # the first word was never guessed, and only chosen answers are imitated
        assert (grad[mask] != 0).all() and ((grad[before] != 0) == whole).all()

def test_mismatched_rows_from_logits():
    "Prompt i with completion i − 1, whose rows are scored like any others; an empty row changes nothing."
    x = {key: value[0] for key, value in stacked('dpo_peers_from_logits')[1].items()}
    rows = Batch(x['input_ids'].astype('int32'), x['completion_mask'] > 0)
    mixed = jax.device_get(jax.jit(mismatched)(rows))
    text = lambda batch, i, which: np.asarray(batch.tokens)[i][np.asarray(which(batch))[i]].tolist()
    prompt, answer = lambda b: np.cumsum(b.mask, 1) == 0, lambda b: b.mask
    for i in range(len(rows.tokens)):
        assert text(mixed, i, answer) == text(rows, i - 1, answer)
        whole = text(rows, i, prompt) if not rows.mask[i, 0] else []
        assert whole[len(whole) - len(text(mixed, i, prompt)):] == text(mixed, i, prompt)
    spoilt = jax.tree.map(lambda a: np.insert(a, 2, 0, axis=0), rows)
    again = jax.device_get(jax.jit(mismatched)(spoilt, spoilt.mask.any(1)))
    for name in ('tokens', 'mask'): assert (np.delete(getattr(again, name), 2, axis=0) == getattr(mixed, name)).all()
    class Words(Saying): # the same guesses after the same word
        def __init__(self, table): super().__init__(table); self.table = table
        def hidden(self, batch): return self.table[batch.tokens]
    table, first = (jnp.asarray(array(np.random.default_rng(i).normal(size=(17, 17)))) for i in (0, 1))
    loss = jax.jit(lambda batch, label, weight: (lambda t: (kto_loss(Words(table), t)[0], kl_baseline(Words(table), t)))(with_mismatches(Words(first), batch, label, weight)))
    label = np.arange(9)%3 > 0
    one, other = loss(spoilt, label, np.arange(9) != 2), loss(jax.tree.map(lambda a: np.insert(np.delete(a, 2, axis=0), 8, 0, axis=0), spoilt), np.append(np.delete(label, 2), True), np.arange(9) < 8)
    for a, b in zip(one, other): close(a, b)

# ── the start ──

@pytest.mark.parametrize('loss', [dpo_loss, part(dpo_loss, loss=cdpo), part(dpo_loss, loss=part(cdpo, flipped=.4)), part(dpo_loss, loss=robust), part(dpo_loss, average=True), part(dpo_loss, link=js),
    part(dpo_loss, tail=.5)], ids=['dpo', 'cdpo', 'cdpo .4', 'robust', 'per token', 'js', 'ld'])
def test_many_start_at_ln_2(loss, told):
    "And pull evenly; no gradient reaches the prompt or the padding."
    z = load('dpo_family')
    mask, logprobs = z['s0/completion_mask'] > 0, right(array(z['s0/policy_per_token_logps']))
    pairs = reference_logprobs(Told(), telling(sides(np.zeros(mask.shape), mask), logprobs), tail=loss.keywords.get('tail', 1.) if isinstance(loss, part) else 1.)
    (total, (weight, seen)), grad = jax.jit(jax.value_and_grad(lambda x: (lambda a, b, c: (a, (b, c)))(*loss(Told(), telling(pairs, x))), has_aux=True))(logprobs)
    close(total/weight, np.log(2), exact/10)
    assert all(seen[name][0] == 0 for name in ('rewards/chosen', 'rewards/rejected', 'rewards/margins', 'lab/delta_chosen', 'lab/delta_rejected'))
    if loss is dpo_loss: close(grad, np.where(mask, np.repeat([-.05, .05], len(mask)//2)[:, None], 0))
    assert (np.asarray(grad)[~mask] == 0).all() and (np.asarray(grad)[mask] != 0).all()

def test_a_reference_that_is_missing_is_named():
    pairs = Pairs(*[Batch(jnp.zeros((1, 3), int), jnp.ones((1, 3), bool))]*2)
    for loss in (dpo_loss, part(pair_loss, loss=nca)):
        with pytest.raises(LabError, match='ref_chosen'): loss(Told(), pairs)
    with pytest.raises(LabError, match='with_mismatches'): kto_loss(Told(), Thumbs(pairs.chosen, jnp.ones(1, bool)))

# ── whole trainings ──

@functools.cache
def optimizer_and_step(name):
    loss, how = name.split('_')
    optimizer = optax.adam(1e-3) if how == 'adam' else optax.sgd(.05 if loss == 'sigmoid' else .0025)
    return optimizer, make_step(dpo_loss if loss == 'sigmoid' else part(dpo_loss, loss=ipo, average=True), optimizer)

@each('dpo_trajectory')
@pytest.mark.parametrize('name', ['sigmoid_sgd', 'sigmoid_adam', 'ipo_sgd', 'ipo_adam'])
def test_fifteen_updates(seed, name):
    "Model, loss, step and loop together follow TRL and transformers, more padding or less; Adam amplifies round-off."
    z, (optimizer, step) = load('dpo_trajectory'), optimizer_and_step(name)
    tokens, mask = (np.pad(z[f'{seed}/{key}'], ((0, 0), (0, 16 - z[f'{seed}/{key}'].shape[1]))) for key in ('input_ids', 'completion_mask'))
    pairs = ask(reference_logprobs, tiny(), sides(tokens, mask))
    expected, names = z[f'{seed}/{name}/trace'], ['loss', *(f'rewards/{x}' for x in ('chosen', 'rejected', 'margins', 'accuracies')), 'logps/chosen', 'logps/rejected']
    rows = []
    for state, seen in fit(init_state(tiny(), optimizer), step, [pairs]*len(expected)): rows.append([seen[n] for n in names])
    keep = [i for i, n in enumerate(names) if n != 'rewards/accuracies']
    tolerance = exact if double else 1e-4
    close(np.array(rows)[:, keep], expected[:, keep], tolerance)
    close(np.array(rows)[1:, 4], expected[1:, 4], 1e-6)
    close(state.model.embed[...], z[f'{seed}/{name}/final_wte'], tolerance)
