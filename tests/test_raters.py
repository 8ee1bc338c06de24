"Agreement, consensus and leans are what krippendorff, scikit-learn, statsmodels and crowd-kit find, and what was planted is found."
import numpy as np, pytest
from goldens import close, each, load
from rlhf_lab.raters import (by_rank, coincidences, cohen_kappa, dawid_skene, fleiss_kappa, judge_answers, judge_pairs, krippendorff_alpha, logistic,
    make_panel, nominal, rater_effects, side_effects, squared, words, worth_and_reliability)

def missing(labels): return np.where(labels < 0, np.nan, labels)
def order(x): return np.argsort(np.argsort(x))

@each('preference_stats', 'ann')
def test_agreement_is_that_of_the_peers(seed):
    z = {name.split('/')[-1]: x for name, x in load('preference_stats').items() if name.startswith(f'ann/{seed}/')}
    full, holes = z['labels_full']*1., missing(z['labels_missing_-1'])
    assert abs(cohen_kappa(full[:, 0], full[:, 1]) - z['cohen_r0_r1']) < 1e-10
    assert abs(cohen_kappa(full[:, 0], full[:, 1], squared) - z['cohen_quadratic_r0_r1']) < 1e-10
    assert abs(fleiss_kappa(full) - z['fleiss']) < 1e-10
    for name, distance in dict(nominal=nominal, ordinal=by_rank, interval=squared).items():
        assert abs(krippendorff_alpha(holes, distance) - z[f'krippendorff_{name}']) < 1e-10

@each('preference_stats', 'ann')
def test_consensus_is_that_of_crowd_kit(seed):
    z = {name.split('/')[-1]: x for name, x in load('preference_stats').items() if name.startswith(f'ann/{seed}/')}
    found = dawid_skene(missing(z['labels_missing_-1']), steps=100, tolerance=-1)
    close(found.truth, z['crowdkit_dawid_skene_posterior'], 1e-8)
    close(found.prior, z['crowdkit_dawid_skene_prior'], 1e-8)
    close(found.confusion.transpose(0, 2, 1), z['crowdkit_dawid_skene_confusion_observed_x_true'], 1e-8)
    assert (np.diff(found.loglik) > -1e-8).all() and len(found.loglik) == 100
    assert abs((found.truth.argmax(1) == z['truth']).mean() - z['dawid_skene_accuracy']) < 1e-12

@each('annotator_extra', 'rater_bt')
def test_leans_are_those_of_statsmodels(seed):
    z = {name.split('/')[-1]: x for name, x in load('annotator_extra').items() if name.startswith(f'rater_bt/{seed}/')}
    found = side_effects(z['first'], z['second'], z['rater'], z['first_wins'])
    close(found.worth, z['item_strength_item0_fixed0'], 1e-9)
    close(found.side, z['rater_first_position_bias'], 1e-9)
    close(found.fit.std_err, z['std_err'], 1e-9)
    assert abs(found.fit.loglik - z['loglik']) < 1e-9 and found.length == 0

def test_where_all_say_the_same_nothing_is_known():
    same = np.ones((5, 3))
    assert all(np.isnan(x) for x in (cohen_kappa(same[:, 0], same[:, 1]), fleiss_kappa(same), krippendorff_alpha(same)))
    assert np.isnan(cohen_kappa([np.nan, 1], [1, np.nan])) and np.isnan(krippendorff_alpha([[1, np.nan], [np.nan, 2]]))
    assert coincidences([[1, np.nan]])[1].sum() == 0

def test_weighted_kappa_and_alpha_do_not_care_who_is_first_nor_for_zero():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 4, (2, 60))*1.
    for distance in (nominal, squared, by_rank):
        assert abs(cohen_kappa(a, b, distance) - cohen_kappa(b, a, distance)) < 1e-12
        assert abs(krippendorff_alpha(np.stack([a, b], 1), distance) - krippendorff_alpha(np.stack([b + 7, a + 7], 1), distance)) < 1e-12

def test_leans_and_reliabilities_that_were_planted_are_found_in_texts():
    "Reliability.md S7: leans within a tenth, reliabilities in the right order."
    random = np.random.default_rng(0)
    write = lambda n: ['good '*g + 'bad '*b + 'so '*s for g, b, s in random.integers(0, [5, 5, 16], (n, 3))]
    gold = lambda texts: np.array([(text.count('good') - text.count('bad'))/2 for text in texts])
    panel, first, second = make_panel(8, 1., .8, side=-.6, length=.5), write(30_000), write(30_000)
    who, won = judge_pairs(panel, first, second, gold, seed=3)
    found = rater_effects(gold(first) - gold(second), who, won, (words(first) - words(second))/10)
    assert abs(found.side.mean()/-.6 - 1) < .1 and abs(found.length.mean()/.5 - 1) < .1
    assert np.corrcoef(order(found.reliability), order([rater.reliability for rater in panel]))[0, 1] >= .9
    again = judge_pairs(panel, first, second, gold, seed=3)
    assert (again[0] == who).all() and (again[1] == won).all()
    _, up = judge_answers(make_panel(3, 4.), first, gold, seed=1)
    assert up[gold(first) > 1].mean() > .95 > .05 > up[gold(first) < -1].mean()

def test_raters_who_vote_against_are_found_without_a_known_score():
    random = np.random.default_rng(1)
    skill, things = np.array([2., 1.2, .6, -.8, 1., 1.6]), random.normal(size=10)
    first, second = np.array([random.permutation(10)[:2] for _ in range(9000)]).T
    rater, longer = random.integers(0, 6, 9000), random.normal(size=9000)
    won = random.random(9000) < 1/(1 + np.exp(-skill[rater]*(things[first] - things[second]) - .5 - .4*longer))
    worth, found = worth_and_reliability(first, second, rater, won, longer)
    assert np.corrcoef(order(found.reliability), order(skill))[0, 1] >= .9 and found.reliability[3] < 0
    assert np.corrcoef(worth, things)[0, 1] > .98 and abs(worth.mean()) < 1e-12 and abs(found.reliability.mean() - 1) < 1e-12
    assert abs(found.side.mean()/.5 - 1) < .1 and abs(found.length.mean()/.4 - 1) < .1

@pytest.mark.parametrize('votes', [dict(first=[0, 0], second=[1, 1], first_won=[1, 1]), dict(first=[0, 2], second=[1, 3], first_won=[1, 0])])
def test_what_votes_cannot_settle_is_refused_or_pulled(votes):
    with pytest.raises(ValueError, match='give a pull'): side_effects(rater=[0, 0], **votes)
    found = side_effects(rater=[0, 0], **votes, pull=1.)
    assert np.isfinite(found.worth).all() and np.isfinite(found.side).all()

def test_newton_finds_where_the_slope_is_zero():
    random = np.random.default_rng(2)
    x, won, offset = random.normal(size=(200, 3)), random.integers(0, 2, 200), random.normal(size=200)
    fit = logistic(x, won, offset, pull=.3)
    assert np.abs(x.T @ (won - 1/(1 + np.exp(-x @ fit.coef - offset))) - .3*fit.coef).max() < 1e-8
