"Intervals keep their promise."
import numpy as np
from rlhf_lab.stats import interval, middle, resample

def test_intervals_hold_the_truth_as_often_as_they_say():
    worlds = np.random.default_rng(0).normal(size=(2000, 256))
    means = resample(256) @ worlds.T / 256
    ends = np.array([middle(world) for world in means.T])
    assert np.allclose(ends[0], interval(worlds[0])[1:])
    assert 0.93 <= np.mean((ends[:, 0] < 0) & (0 < ends[:, 1])) <= 0.97
