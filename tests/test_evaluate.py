"The statistics reproduce torchmetrics, scikit-learn and their own promises."
from pathlib import Path
import numpy as np, pytest
from rlhf_lab.stats import brier, ece, fit_temperature, interval, log_loss, middle, resample

golden = Path(__file__).parent/'golden'

@pytest.fixture(scope='module')
def calibration(): return np.load(golden/'annotator_extra.npz')

@pytest.fixture(scope='module')
def pairs(): return np.load(golden/'preference_stats.npz')

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('bins', [10, 15])
@pytest.mark.parametrize('name, order', [('l1', 1), ('l2', 2), ('max', np.inf)])
def test_calibration_error_is_torchmetrics(calibration, seed, bins, name, order):
    prob, label, expected = (calibration[f'ece/s{seed}/{key}'] for key in ('prob', 'label', f'{name}_bins{bins}'))
    assert abs(ece(prob, label, bins, order) - expected) < 1e-9

@pytest.mark.parametrize('seed', range(3))
def test_temperature_is_one_over_the_logistic_slope(pairs, seed):
    margin, label = pairs[f'cal/s{seed}/logit_margin'], pairs[f'cal/s{seed}/label']
    assert abs(fit_temperature(np.where(label, margin, -margin)) - pairs[f'cal/s{seed}/temperature']) < 1e-5
    prob = 1/(1 + np.exp(-margin))
    assert abs(log_loss(prob, label) - pairs[f'cal/s{seed}/log_loss']) < 1e-10
    assert abs(brier(prob, label) - pairs[f'cal/s{seed}/brier']) < 1e-10

def test_intervals_hold_the_truth_as_often_as_they_say():
    worlds = np.random.default_rng(0).normal(size=(2000, 256))
    means = resample(256) @ worlds.T / 256
    ends = np.array([middle(world) for world in means.T])
    assert np.allclose(ends[0], interval(worlds[0])[1:])
    assert 0.93 <= np.mean((ends[:, 0] < 0) & (0 < ends[:, 1])) <= 0.97
