"""Scenes of handwritten digits, and how well something divides their pixels into the digits."""

from typing import NamedTuple

import numpy as np
from matplotlib.colors import hsv_to_rgb
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import train_test_split

SIDE, DIGIT = 24, 8  # pixels of a scene's side and of a digit's
INK = 0.25  # a pixel of a digit that is darker belongs to it
HIDDEN = 0.2  # the most of a digit's ink that may lie over that of others


class Scenes(NamedTuple):
    pixels: np.ndarray  # (scenes, 3, SIDE, SIDE), float32 from 0 to 1: colours before black
    owner: np.ndarray  # (scenes, SIDE, SIDE): which of its digits a pixel belongs to, -1 for none


def compose(digits: np.ndarray, count: int, seed: int) -> Scenes:
    """Scenes of two to four of these digits, of any colour, at random places."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((count, SIDE, SIDE, 3), np.float32)
    owner = np.full((count, SIDE, SIDE), -1)
    for image, belongs in zip(pixels, owner, strict=True):
        number = rng.integers(2, 5)
        while (placed := belongs.max() + 1) < number:
            digit, (top, left) = rng.choice(digits), rng.integers(0, SIDE - DIGIT + 1, 2)
            window = np.s_[top : top + DIGIT, left : left + DIGIT]
            ink = digit > INK
            if (belongs[window][ink] >= 0).mean() <= HIDDEN:
                alpha, colour = digit[..., None], hsv_to_rgb((rng.random(), 1.0, 1.0))
                image[window] = (1 - alpha) * image[window] + alpha * colour
                belongs[window][ink] = placed
    return Scenes(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), owner)


def scenes_of_digits(count: int, held_out: int) -> tuple[Scenes, Scenes]:
    """Scenes to learn from, and held-out ones of a held-out quarter of scikit-learn's digits."""
    images, labels = load_digits(return_X_y=True)
    digits = images.reshape(-1, DIGIT, DIGIT) / images.max()
    learn, others = train_test_split(digits, test_size=0.25, stratify=labels, random_state=0)
    return compose(learn, count, seed=0), compose(others, held_out, seed=1)


def rand_index(owner: np.ndarray, found: np.ndarray) -> float:
    """The mean over scenes of the adjusted Rand index over the digits' pixels."""
    scenes = zip(owner, found, strict=True)
    return float(np.mean([adjusted_rand_score(o[o >= 0], f[o >= 0]) for o, f in scenes]))


def baselines(scenes: Scenes) -> dict[str, np.ndarray]:
    """Pixels divided by what touches, and by places with the number of digits known."""
    touching = [ndimage.label(p.max(0) > INK, np.ones((3, 3)))[0] for p in scenes.pixels]
    near = np.zeros_like(scenes.owner)
    for clusters, o in zip(near, scenes.owner, strict=True):
        k_means = KMeans(o.max() + 1, n_init=3, random_state=0)
        clusters[o >= 0] = k_means.fit_predict(np.argwhere(o >= 0))
    return {"connected patches": np.array(touching), "k-means, told how many": near}
