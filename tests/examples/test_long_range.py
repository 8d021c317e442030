"""examples/long_range.py, in a short form, and what it is made of."""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for needed in ("matplotlib", "tqdm"):
    pytest.importorskip(needed)

pytestmark = pytest.mark.any_kernel_set


@pytest.fixture
def words(load):
    """Numbers for words: 3 to 99 are words of the text, 100 to 999 are names and values."""
    filler = np.random.default_rng(0).integers(3, 100, 6000)
    return load("recall").Words([str(i) for i in range(1000)], np.arange(100, 1000), filler, filler)


def places_of(name, text, equals):
    """Where a word stands as a name; it may be a value besides."""
    return np.flatnonzero((text[:-1] == name) & (text[1:] == equals))


def test_training_asks_for_what_the_text_said(load, words):
    recall = load("recall")
    text, answers = recall.training_text(words, np.random.default_rng(1))
    assert text.shape == answers.shape == (recall.LENGTH,)
    [asked] = np.nonzero(answers >= 0)
    assert len(asked) == recall.LENGTH // 16
    for place in asked:
        name, equals, value = text[place - 1 : place + 2]
        assert equals == recall.EQUALS and value == answers[place]
        first = places_of(name, text[: place - 1], recall.EQUALS)
        assert len(first) == 1
        assert text[first[0] + 1 : first[0] + 3].tolist() == [recall.EQUALS, value]


def test_long_texts_have_answers_where_they_say(load, words):
    recall = load("recall")
    distances = [50, 1000, 3000, recall.START_OF_TEXT] * 5
    text, questions = recall.long_text(words, 4000, distances, np.random.default_rng(2))
    assert sorted(q.distance for q in questions) == sorted(distances)
    for question in questions:
        name, equals, value = text[question.place - 1 : question.place + 2]
        found = places_of(name, text[: question.place - 1], recall.EQUALS)
        assert found.tolist() == [question.answer - 2]
        assert text[question.answer - 1 : question.answer + 1].tolist() == [equals, value]
        if question.distance == recall.START_OF_TEXT:
            assert question.answer < recall.KEPT
        else:
            assert 0 <= question.place - question.answer - question.distance + 2 < 60
    assert np.sum(text == recall.EQUALS) == 4000 // 64 + len(distances)


def test_each_way_sees_what_it_says(load, monkeypatch):
    """Beside attention with a mask."""
    long_range = load("long_range")
    monkeypatch.setattr(long_range, "PART", 100)
    monkeypatch.setattr(long_range, "WINDOW", 32)
    monkeypatch.setattr(long_range, "KEPT", 8)
    rng = np.random.default_rng(3)
    q, k, v = torch.from_numpy(rng.standard_normal((3, 1, 2, 450, 16), dtype=np.float32))
    back = torch.arange(450)[:, None] - torch.arange(450)
    causal = back >= 0
    window = causal & (back < 32)
    contenders = {
        long_range.cached(): causal,
        long_range.cached(window_tokens=32): window,
        long_range.cached(window_tokens=32, sink_tokens=8): window
        | causal & (torch.arange(450) < 8),
        long_range.ATTENTION["PyTorch, full"]: causal,
        long_range.masked: window,
    }
    for attend, mask in contenders.items():
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(attend(q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_weights_of_a_question_sum_to_one(load, words):
    recall, long_range = load("recall"), load("long_range")
    torch.manual_seed(0)
    attend = long_range.ATTENTION["fastattn, full"]
    weights = recall.Model().weights(words.held_out[:251], attend)
    assert weights.shape == (recall.LAYERS, recall.HEADS, 251)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_quick(load, tmp_path, capsys):
    picture = tmp_path / "long_range.png"
    assert load("long_range").main(["--quick", "--plot", str(picture)]) == 0
    report = capsys.readouterr().out
    assert re.search(
        r"^[\d.]+ % of 20 answers 1,000 tokens back are right .*: ok\n\Z", report, re.M
    )
    rows = dict(
        re.findall(r"^((?:fastattn|PyTorch), [a-z ]+?)  +([\d. ]+?)  +[\d.]+ +\d+% ", report, re.M)
    )
    accuracy = {name: [float(a) for a in row.split()] for name, row in rows.items()}
    assert len(accuracy) == 5
    np.testing.assert_allclose(accuracy["fastattn, full"], accuracy["PyTorch, full"], atol=5)
    np.testing.assert_allclose(accuracy["fastattn, window"], accuracy["PyTorch, window"], atol=5)
    assert picture.read_bytes().startswith(b"\x89PNG")
