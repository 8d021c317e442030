"""Slot attention on scenes of digits, in its short form."""

import re

import numpy as np
import pytest

pytestmark = pytest.mark.any_kernel_set


@pytest.fixture
def discovery(load):
    return load("object_discovery", "torch", "tqdm", "matplotlib", "sklearn")


@pytest.fixture
def scenes(load):
    return load("digit_scenes", "sklearn")


def test_short_form_finds_digits(discovery, tmp_path, capsys):
    picture = tmp_path / "slots.png"
    assert discovery.main(["--quick", "--plot", str(picture)]) == 0
    report = capsys.readouterr().out
    index = dict(re.findall(r"^(.+?) +adjusted Rand index ([\d.]+)$", report, re.M))
    assert set(index) == {
        "connected patches",
        "k-means, told how many",
        "slots, by fastattn",
        "slots, by PyTorch",
    }
    for name in ("slots, by fastattn", "slots, by PyTorch"):
        assert float(index[name]) >= discovery.QUICK.target
    shares = re.findall(r"^(\w+): [\d.]+ ms a step \(median\), attention took \d+%", report, re.M)
    assert shares == ["fastattn", "PyTorch"]
    assert report.splitlines()[-1].startswith(
        f"adjusted Rand index {index['slots, by fastattn']} on {discovery.QUICK.held_out} held-out"
    )
    assert report.endswith(": ok\n")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_missed_target_is_told(discovery, monkeypatch, tmp_path, capsys):
    """After one step slots divide a scene by place alone, which is worth 0.32."""
    monkeypatch.setattr(discovery, "QUICK", discovery.QUICK._replace(scenes=20, steps=1))
    assert discovery.main(["--quick", "--plot", str(tmp_path / "slots.png")]) == 1
    assert capsys.readouterr().out.endswith("MISSED\n")


def test_both_attentions_and_their_gradients_agree(discovery):
    torch = discovery.torch
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 1, 5, 64), (2, 1, 576, 64), (2, 1, 576, 65)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    v[..., -1] = 1.0
    results = []
    for attend in discovery.ATTENTION.values():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        (out**2).sum().backward()
        results.append((out.detach(), *(x.grad for x in leaves)))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    # The slots share all the pixels between them.
    np.testing.assert_allclose(results[0][0][..., -1].sum(-1), 576.0, rtol=1e-5)


def test_only_the_last_round_is_differentiated(discovery):
    torch = discovery.torch
    torch.manual_seed(0)
    model, pixels = discovery.SlotAutoencoder(), torch.rand(2, 3, 24, 24)
    calls = []

    def attend(q, k, v):
        out = discovery.written_out(q, k, v)
        out.register_hook(lambda gradient: calls.append(gradient.shape))
        return out

    model.loss(pixels, attend).backward()
    assert calls == [(2, 1, 5, 65)]
    assert model.first.grad.abs().max() > 0


def test_scenes_are_of_the_digits(scenes):
    learn, held_out = scenes.scenes_of_digits(40, 30)
    for part, count in ((learn, 40), (held_out, 30)):
        assert part.pixels.shape == (count, 3, 24, 24) and part.pixels.dtype == np.float32
        assert part.pixels.min() >= 0 and part.pixels.max() <= 1
        numbers = part.owner.max(axis=(1, 2)) + 1
        assert set(numbers) == {2, 3, 4}
        ink = part.pixels.max(1)
        # Where digits lie over each other, their lightest pixels mix.
        assert ink[part.owner >= 0].min() > scenes.INK / 2
        assert ink[part.owner < 0].max() <= 0.6
        assert all(
            (o == i).sum() > 5 for o, n in zip(part.owner, numbers, strict=True) for i in range(n)
        )


def test_rand_index_by_hand(scenes):
    owner = np.array([[[0, 0, 1], [1, -1, -1]]])
    assert scenes.rand_index(owner, np.array([[[7, 7, 3], [3, 7, 1]]])) == 1.0
    assert scenes.rand_index(owner, np.array([[[7, 7, 7], [7, 1, 1]]])) == 0.0
    with_nothing = scenes.Scenes(np.zeros((1, 3, 2, 3), np.float32), owner)
    with_nothing.pixels[0, 1] = owner[0] >= 0
    # Four pixels that touch are one patch; their places make two clusters.
    touching, near = scenes.baselines(with_nothing).values()
    assert scenes.rand_index(owner, touching) == 0.0
    assert set(near[0].flatten()) == {0, 1}
