"Probabilities are mended and measured as scikit-learn and torchmetrics do it, and as the definitions say."
from fractions import Fraction
from itertools import combinations
from pathlib import Path
import numpy as np, pytest
from rlhf_lab.stats import (agreement_ceiling, brier, calibration_scores, cross_fit, ece, fit_isotonic, fit_platt, fit_temperature, log_loss,
    sigmoid, symmetrise, temper, wilson)

golden = Path(__file__).parent/'golden'

@pytest.fixture(scope='module')
def calibration(): return np.load(golden/'annotator_extra.npz')

@pytest.fixture(scope='module')
def pairs():
    stored = np.load(golden/'preference_stats.npz')
    return lambda seed, *names: [stored[f'cal/s{seed}/{name}'] for name in names]

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('bins', [10, 15])
@pytest.mark.parametrize('name, order', [('l1', 1), ('l2', 2), ('max', np.inf)])
def test_calibration_error_is_torchmetrics(calibration, seed, bins, name, order):
    prob, label, expected = (calibration[f'ece/s{seed}/{key}'] for key in ('prob', 'label', f'{name}_bins{bins}'))
    assert abs(ece(prob, label, bins, order) - expected) < 1e-9
    if order == 1: assert abs(calibration_scores(prob, label, bins=bins)['ece'][0] - expected) < 1e-9

@pytest.mark.parametrize('seed', range(3))
def test_temperature_is_one_over_the_logistic_slope(pairs, seed):
    margin, label, temperature, loss, score = pairs(seed, 'logit_margin', 'label', 'temperature', 'log_loss', 'brier')
    assert abs(fit_temperature(np.where(label, margin, -margin)) - temperature) < 1e-5
    assert np.allclose(temper(margin, label)(margin), 1/(1 + np.exp(-margin/temperature)), atol=1e-6)
    prob = sigmoid(margin)
    assert abs(log_loss(prob, label) - loss) < 1e-10 and abs(brier(prob, label) - score) < 1e-10
    scores = calibration_scores(prob, label)
    assert abs(scores['nll'][0] - loss) < 1e-10 and abs(scores['brier'][0] - score) < 1e-10

@pytest.mark.parametrize('seed', range(3))
def test_isotonic_is_scikit_learns(pairs, seed):
    margin, label, expected = pairs(seed, 'logit_margin', 'label', 'isotonic_fitted')
    assert np.abs(fit_isotonic(margin, label)(margin) - expected).max() < 1e-10
    edged = fit_isotonic(margin, label, .01)(margin)
    assert edged.min() == .01 and edged.max() == .99 and (np.diff(edged[np.argsort(margin)]) >= 0).all()

@pytest.mark.parametrize('seed', range(3))
def test_platt_is_the_sigmoid_calibration_of_scikit_learn(pairs, seed):
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator
    class Margin(ClassifierMixin, BaseEstimator):
        "A judge whose decision is its only input."
        def fit(self, X, y): self.classes_ = np.array([0, 1]); return self
        def decision_function(self, X): return X[:, 0]
        def predict(self, X): return (X[:, 0] > 0)*1
    margin, label = pairs(seed, 'logit_margin', 'label')
    theirs = CalibratedClassifierCV(FrozenEstimator(Margin().fit(None, None)), method='sigmoid', cv=4)
    asked = np.linspace(-6, 6, 25)
    expected = theirs.fit(margin[:, None], label*1).predict_proba(asked[:, None])[:, 1]
    assert np.abs(fit_platt(margin, label)(asked) - expected).max() < 1e-3 # their optimiser stops early

def test_cross_fitted_pairs_meet_the_calibrator_of_the_other_folds(pairs):
    margin, label = pairs(0, 'logit_margin', 'label')
    seen = []
    def fit(margins, label):
        inner = fit_isotonic(margins, label, .01)
        def ask(asked): seen.append((set(np.abs(margins)), set(np.abs(asked)))); return inner(asked)
        return ask
    prob = cross_fit(np.where(label, margin, -margin), fit)
    assert len(seen) == 5 and not any(a & b for a, b in seen) and set.union(*(b for _, b in seen)) == set(np.abs(margin))
    assert np.allclose(prob[:400] + prob[400:], 1) and set(symmetrise(margin)[1]) == {0., 1.}

def test_agreement_is_counted_over_pairs_of_raters_and_majorities_of_the_others():
    "A ragged table against the definitions, rater by rater, in fractions."
    votes = np.array([[1, 1, 0, np.nan], [0, 0, 0, 0], [1, np.nan, 0, np.nan], [np.nan, 1, np.nan, np.nan], [1, 1, 1, 0]])
    agreement, lower = [], []
    for row in votes:
        said = [int(v) for v in row if v == v]
        if len(said) < 2: continue
        couples = [a == b for a, b in combinations(said, 2)]
        agreement.append(Fraction(sum(couples), len(couples)))
        right = []
        for i, vote in enumerate(said):
            others = said[:i] + said[i + 1:]
            lead = 2*sum(others) - len(others)
            right.append(Fraction(1, 2) if lead == 0 else Fraction((lead > 0) == vote))
        lower.append(sum(right)/len(right))
    found = agreement_ceiling(votes)
    assert found['pairs'] == 4 and found['votes'] == 13
    assert abs(found['agreement'][0] - float(sum(agreement)/4)) < 1e-12 and abs(found['lower'][0] - float(sum(lower)/4)) < 1e-12

def test_wilson_is_the_set_of_shares_that_a_score_test_keeps():
    _, low, high = wilson(7, 20)
    for end in (low, high): assert abs(abs(7/20 - end)/(end*(1 - end)/20)**.5 - 1.959964) < 1e-5
    for n in range(1, 500):
        (none, low, _), (all_, _, high) = wilson(0, n), wilson(n, n)
        assert (none, low) == (0, 0) and (all_, high) == (1, 1) # exactly: error bars have no negative lengths
