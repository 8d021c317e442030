"""examples/translation.py, in a short form, and what it is made of."""

import itertools
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for needed in ("babel", "matplotlib", "tqdm"):
    pytest.importorskip(needed)

pytestmark = pytest.mark.any_kernel_set


@pytest.fixture
def model(load):
    """One whose weights are large, so that its outputs differ in likelihood."""
    torch.manual_seed(0)
    model = load("seq2seq").Translator(9, outputs=3, width=8, heads=2, layers=2)
    with torch.no_grad():
        for weights in model.parameters():
            weights *= 2
    return model


SOURCE = torch.tensor([[3, 4, 5, 6, 7], [5, 3, 8, 0, 0]])  # the second has padding


def likelihoods(model, source, outputs):
    """Of each output, which begins with the line end, by decoding it whole."""
    target = torch.tensor(outputs)
    with torch.no_grad():
        logits = model(
            source.expand(len(target), -1), target[:, :-1],
            torch.nn.functional.scaled_dot_product_attention,
        )  # fmt: skip
    log_p = logits.log_softmax(-1).gather(2, target[:, 1:, None])[..., 0]
    ended = torch.cumsum(target[:, 1:] == 0, dim=1) - (target[:, 1:] == 0).long() > 0
    return log_p.masked_fill(ended, 0).sum(1)


@pytest.mark.parametrize("name", ["fastattn", "PyTorch"])
def test_a_wide_beam_finds_the_most_likely_output(load, model, name):
    seq2seq, translation = load("seq2seq"), load("translation")
    # All outputs of three characters, where only ends follow an end.
    every = [
        [0, *o]
        for o in itertools.product(range(3), repeat=3)
        if not re.search("0[^0]", "".join(map(str, o)))
    ]
    attend, memory = translation.ATTENTION[name], translation.MEMORY[name]
    found = seq2seq.beam_search(model, SOURCE, 3, 12, attend, memory)
    for row, source in zip(found.tolist(), SOURCE, strict=True):
        best = likelihoods(model, source[None], every).argmax()
        assert [0, *row] == every[best]


def test_one_beam_takes_the_most_likely_character(load, model):
    seq2seq, translation = load("seq2seq"), load("translation")
    attend, memory = translation.ATTENTION["fastattn"], translation.MEMORY["fastattn"]
    tokens = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(4):
        with torch.no_grad():
            best = model(SOURCE, tokens, attend)[:, -1:].argmax(-1)
        best[(tokens[:, -1:] == 0) & (tokens.shape[1] > 1)] = 0
        tokens = torch.cat([tokens, best], dim=1)
    found = seq2seq.beam_search(model, SOURCE, 4, 1, attend, memory)
    assert found.tolist() == tokens[:, 1:].tolist()


def test_padding_changes_nothing(load, model):
    attend = load("translation").ATTENTION["fastattn"]
    target = torch.tensor([[0, 1, 2]])
    with torch.no_grad():
        padded = model(SOURCE[1:], target, attend)
        alone = model(SOURCE[1:, :3], target, attend)
    torch.testing.assert_close(padded, alone)


def test_tests_are_held_out(load):
    dates = load("dates")
    data = dates.read_data(5, 300, 100)
    assert data.languages == 5
    trained = {date for _, date in data.training}
    for pairs in (data.held_out_dates, data.other_forms, data.unseen_languages):
        assert len({text for text, _ in pairs}) == 100
        assert not trained & {date for _, date in pairs}
    assert len(data.unseen.split(", ")) >= dates.UNSEEN


def test_dates_have_their_languages_words_and_digits(load):
    dates = load("dates")
    day = [(dates.datetime.date(2045, 8, 12) - dates.FIRST).days]
    for name, forms in {
        "mr": {"शनिवार, १२ ऑगस्ट, २०४५", "१२ ऑगस्ट, २०४५"},
        "es": {"sábado, 12 de agosto de 2045", "12 de agosto de 2045", "12 ago 2045"},
        "ar_EG": {"السبت، ١٢ أغسطس ٢٠٤٥"},
    }.items():
        drawn = dates.draw(dates.random.Random(0), len(forms), [dates.Locale.parse(name)], day)
        assert {date for _, date in drawn} == {"2045-08-12"}
        assert {text for text, _ in drawn} & forms, drawn


def test_quick(load, tmp_path, capsys):
    picture = tmp_path / "translation.png"
    assert load("translation").main(["--quick", "--plot", str(picture)]) == 0
    report = capsys.readouterr().out
    exact = re.search(r"^exact match ([\d.]+) % on 200 held-out dates .*: ok\n\Z", report, re.M)[1]
    ours, theirs = re.search(
        r"^held-out dates, 8 languages +([\d.]+) +\S+ +([\d.]+)", report, re.M
    ).groups()
    assert float(exact) == float(ours) >= 80
    assert np.isclose(float(ours), float(theirs), atol=1)
    assert picture.read_bytes().startswith(b"\x89PNG")
