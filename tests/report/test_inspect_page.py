"""The page of what every exit predicts, without a browser."""

import base64
import json
import re

import numpy as np

from layerskip_jax.data.tokenizer import train_tokenizer
from layerskip_jax.evaluation.inspection import ExitPredictions
from layerskip_jax.report.inspect_page import SCALE, Inspected, build_inspect_page, visible
from tests.report.test_report_page import Balanced

EVIL = "</script><b onclick='x'>&\u2028"


def test_every_character_is_to_be_seen():
    assert visible(" a\n") == "·a↵"
    assert visible("\n" + " " * 16) == "↵·×16"
    assert visible("\t\t") == "⇥⇥"
    assert visible("\x1b[31m\u202e") == "\\x1b[31m\\u202e"
    assert visible("aaaaaa日") == "aaaaaa日"
    assert visible("") == "∅"


def test_the_page_holds_its_cells_and_no_markup_of_the_text():
    tokenizer = train_tokenizer(iter([EVIL] * 9), 300)
    tokens = tokenizer.encode(EVIL).ids
    random = np.random.default_rng(0)
    shape = (3, 1, len(tokens), 5)
    ids = random.integers(0, tokenizer.get_vocab_size(), shape).astype(np.int32)
    p = random.random(shape).astype(np.float32)
    page = build_inspect_page(EVIL, tokenizer, [Inspected(tokens, ExitPredictions(ids, p))] * 2)
    Balanced(re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    assert page.count("</script>") == 2 and "<b " not in page
    assert "http" not in page and "<link" not in page and "@import" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    [text, _] = data["texts"]
    assert "".join(data["words"][i] for i in text["read"]) == visible(EVIL)
    index = np.frombuffer(base64.b64decode(text["index"]), "<u2").reshape(-1, 3, 5)
    shown = np.frombuffer(base64.b64decode(text["p"]), "<u2").reshape(-1, 3, 5)
    np.testing.assert_allclose(shown / SCALE, p[:, 0].transpose(1, 0, 2), atol=0.5 / SCALE)
    known = {place: token for token, place in zip(tokens, text["read"], strict=True)}
    for (position, layer, rank), place in np.ndenumerate(index):
        if place in known:
            assert ids[layer, 0, position, rank] == known[place]


def test_a_long_text_in_a_deep_model_stays_small():
    tokenizer = train_tokenizer(iter(["some text"]), 300)
    shape = (80, 1, 2000, 5)
    seen = ExitPredictions(np.zeros(shape, np.int32), np.full(shape, 0.2, np.float32))
    assert len(build_inspect_page("deep", tokenizer, [Inspected([1] * 2000, seen)])) < 5_000_000
