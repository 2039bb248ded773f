import json
import math

from layerskip_jax.run_folder.atomic import to_json, write_json
from layerskip_jax.run_folder.paths import read_json_lines


def test_a_number_that_is_not_finite_is_null_in_json(tmp_path):
    """NaN and Infinity are Python's own words, which other readers of JSON refuse."""
    value = {"step": 1, "loss": math.nan, "exits": [(1.5, math.inf), {"a": -math.inf}], "n": None}
    expected = {"step": 1, "loss": None, "exits": [[1.5, None], {"a": None}], "n": None}
    write_json(tmp_path / "one.json", value)
    text = (tmp_path / "one.json").read_text()
    assert json.loads(text, parse_constant=_refuse) == expected
    (tmp_path / "lines.jsonl").write_text(to_json(value) + "\n")
    assert read_json_lines(tmp_path / "lines.jsonl") == [expected]


def _refuse(word):
    raise AssertionError(f"{word} is no JSON")
