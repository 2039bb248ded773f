import json
import shutil

import jax
import numpy as np
import pytest

from layerskip_jax.cli import main
from layerskip_jax.decoding.exit_policy import POLICIES, ExitPolicy
from layerskip_jax.decoding.weights import decoder_weights
from layerskip_jax.evaluation.calibration import (
    BOUNDS,
    Measured,
    PolicyTexts,
    begin_at,
    betting_p,
    calibrate,
    candidate_thresholds,
    hoeffding_p,
    learn_then_test,
    require_enough,
    texts_needed,
)
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.run_folder.exit_policies import load_threshold, read_policies, store_policy
from layerskip_jax.run_folder.paths import RunFolder
from layerskip_jax.schema import ConfigError, UserError
from tests.helpers import small_model


def test_hoeffdings_p_value_by_hand():
    def p_value(texts, mean):
        return hoeffding_p(np.full(texts, mean), 0.1, 0.05)

    assert p_value(1000, 0.05) == pytest.approx(0.006738, abs=1e-6)
    assert p_value(100, 0.05) == pytest.approx(0.606531, abs=1e-6)
    assert p_value(1000, 0.2) == 1  # above the risk that is allowed


def test_a_bettors_capital_by_hand():
    # Stakes sqrt(2 ln 20 / (4 variance)), of .25 first, then (.25 + .0625) / 2 and
    # (.25 + .0625 + .0069) / 3, all above 1.
    capital = 1.1 * (1 - (0.25 - 0.1)) * 1.1
    assert betting_p(np.array([0.0, 0.25, 0.0, 1.0]), 0.1, 0.05) == pytest.approx(1 / 1.1)
    assert betting_p(np.array([0.0, 0.0, 0.25, 0.0]), 0.1, 0.05) == pytest.approx(1 / 1.1**2)
    assert betting_p(np.array([0.25, 0.0, 0.0, 0.0]), 0.1, 0.05) == pytest.approx(
        1 / (capital * 1.1)
    )
    # With more texts the stakes are smaller: the first is sqrt(2 ln 20 / (1000 / 4)).
    assert betting_p(np.append(0.0, np.ones(999)), 0.1, 0.05) == pytest.approx(
        1 / (1 + 0.1 * np.sqrt(8 * np.log(20) / 1000))
    )


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_bound_accepts_what_exceeds_the_risk_as_rarely_as_it_says(bound):
    random = np.random.default_rng(0)
    draws = {
        "all or nothing": random.binomial(1, 0.1, (1000, 300)).astype(float),
        "small": random.beta(1, 9, (1000, 300)),
    }
    for name, risks in draws.items():  # with a mean of .1, the edge
        wrong = np.mean([BOUNDS[bound](row, 0.1, 0.05) <= 0.05 for row in risks])
        assert wrong <= 0.065, name  # .05, and two standard errors of 1,000 draws
    # And it does accept what is well within.
    assert BOUNDS[bound](np.full(1000, 0.04), 0.1, 0.05) <= 0.05


def test_betting_needs_fewer_texts_where_risks_vary_little():
    risks = np.random.default_rng(0).beta(2, 198, 2000)  # a mean of .01, a deviation of .007
    assert texts_needed(risks, 0.02, 0.95, "hoeffding") > 10_000
    assert texts_needed(risks, 0.02, 0.95, "betting") < 1_000


def test_the_texts_needed_are_the_fewest_that_are_accepted():
    for bound, p_value in BOUNDS.items():
        for risk, mean in ((0.1, 0.05), (0.05, 0.0), (0.3, 0.01)):
            needed = texts_needed([mean], risk, 0.95, bound)
            assert p_value(np.full(needed, mean), risk, 0.05) <= 0.05
            assert p_value(np.full(needed - 1, mean), risk, 0.05) > 0.05
        assert texts_needed([0.1], 0.1, 0.95, bound) is None
    assert texts_needed([0.05], 0.1, 0.95, "hoeffding") == 600  # ln(20) / (2 * .05^2) = 599.1


def measured(means, texts=1000):
    """Returns a `measure` by threshold, and the thresholds that it was asked for."""
    asked = []

    def measure(threshold):
        asked.append(threshold)
        return Measured(np.full(texts, means[threshold]), 4 * threshold)

    return measure, asked


def test_testing_goes_on_up_to_the_first_failure():
    # The p-values of 1000 texts at delta .1: 2e-9, .0067, 1 and 2e-9.
    measure, asked = measured({0.1: 0.0, 0.2: 0.05, 0.3: 0.12, 0.4: 0.0})
    accepted, tested = learn_then_test((0.1, 0.2, 0.3, 0.4), measure, 0.1, 0.95, "hoeffding")
    assert (accepted.threshold, accepted.layers) == (0.2, 0.8)
    assert accepted.risk == pytest.approx(0.05)
    assert asked == [0.1, 0.2, 0.3]  # 0.4 would pass, and is not looked at
    assert [step.threshold for step in tested] == asked


def test_all_may_be_accepted():
    measure, _ = measured({0.1: 0.0, 0.2: 0.01})
    assert learn_then_test((0.1, 0.2), measure, 0.1, 0.95, "hoeffding")[0].threshold == 0.2


def test_where_none_is_accepted_the_number_of_texts_is_named():
    # ln(20) / (2 * .05^2) = 599.1
    measure, _ = measured({0.1: 0.05, 0.2: 0.0}, texts=100)
    with pytest.raises(UserError, match="about 600 texts would be enough, and there are 100"):
        learn_then_test((0.1, 0.2), measure, 0.1, 0.95, "hoeffding")
    measure, _ = measured({0.1: 0.2}, texts=100)
    with pytest.raises(UserError, match="no number of texts is enough"):
        learn_then_test((0.1,), measure, 0.1, 0.95, "hoeffding")


def test_too_few_texts_are_refused_before_anything_is_computed():
    for bound, needed in (("hoeffding", 600), ("betting", 63)):
        require_enough(needed, 0.05, 0.95, bound)
        with pytest.raises(UserError, match=f"{needed - 1} texts .* needs {needed}"):
            require_enough(needed - 1, 0.05, 0.95, bound)
    for risk, confidence in ((0.0, 0.9), (1.0, 0.9), (0.1, 1.0), (0.1, 0.0)):
        with pytest.raises(ConfigError, match=r"must be in \(0, 1\)"):
            require_enough(10**6, risk, confidence, "betting")
    with pytest.raises(ConfigError, match="--bound='bet'"):
        require_enough(10**6, 0.1, 0.9, "bet")


def test_a_pilot_tells_where_testing_begins():
    means = {0.1: 0.0, 0.2: 0.01, 0.3: 0.04, 0.4: 0.06, 0.5: 0.2}
    measure, asked = measured(means)
    # The last that is within half of the risk; it is found by halving.
    assert begin_at((0.1, 0.2, 0.3, 0.4, 0.5), measure, 0.1) == (0.3, 0.4, 0.5)
    assert len(asked) <= 3
    assert begin_at((0.4, 0.5), measure, 0.1) == (0.4, 0.5)
    assert begin_at((0.1, 0.2), measure, 0.1) == (0.2,)


class Texts:
    """Texts by number, whose risks at a threshold are given."""

    def __init__(self, numbers, risk_of):
        self.numbers, self.risk_of = numbers, risk_of

    def measure(self, threshold):
        risks = np.array([self.risk_of(threshold, number) for number in self.numbers])
        return Measured(risks, 4 * threshold)


def test_texts_of_the_pilot_test_nothing_and_texts_held_out_choose_nothing():
    read = []

    def risk_of(threshold, number):
        return {0: 0.0, 1: threshold / 5, 2: 0.5}[number]

    def texts(numbers):
        read.append(numbers)
        return Texts(numbers, risk_of)

    found = calibrate(
        texts,
        pilot=[0] * 10, calibration=[1] * 1000, held_out=[2] * 20,
        thresholds=(0.1, 0.2, 0.3, 0.4), risk=0.1, confidence=0.95,
    )  # fmt: skip
    assert read == [[0] * 10, [1] * 1000, [2] * 20]
    # The pilot allows the boldest to begin with, and the others would have allowed it too.
    assert [step["threshold"] for step in found["tested"]] == [0.4]
    assert found["threshold"] == 0.4 and found["mean_risk"] == pytest.approx(0.08)
    assert found["held_out"] == {"texts": 20, "risk": 0.5, "mean_layers": pytest.approx(1.6)}
    found = calibrate(
        texts,
        pilot=[], calibration=[1] * 1000, held_out=[2] * 20,
        thresholds=(0.1, 0.2, 0.3, 0.4, 0.6), risk=0.1, confidence=0.95,
    )  # fmt: skip
    assert [step["threshold"] for step in found["tested"]] == [0.1, 0.2, 0.3, 0.4, 0.6]
    assert found["threshold"] == 0.4


@pytest.mark.parametrize("name", POLICIES)
def test_candidates_go_from_the_most_careful_on(name):
    thresholds, kind = candidate_thresholds(name, 5), POLICIES[name]
    falling = np.diff(thresholds) < 0
    assert falling.all() if kind.careful_high else not falling.any()
    for threshold in thresholds:
        # It is a threshold of the policy, and its name says all of it.
        assert float(str(ExitPolicy(name, threshold)).partition(":")[2]) == threshold


def texts_of(policy, kv, **options):
    config = small_model()
    weights = decoder_weights(Transformer(config, jax.random.key(0)))
    random = np.random.default_rng(0)
    texts = [random.integers(1, 64, length).tolist() for length in (9, 2, 17, 5)]
    found = PolicyTexts(weights, config, texts, policy=policy, exits=(1, 3), kv=kv, **options)
    return found, [len(text) - 1 for text in texts]


@pytest.mark.parametrize("kv", ["deferred", "propagate"])
def test_what_never_leaves_has_no_risk_and_what_leaves_at_once_has_the_first_exits(kv):
    found, lengths = texts_of("patience", kv)
    never = found.measure(3)
    assert (never.risks == 0).all() and never.layers == 4
    at_once = found.measure(1)
    assert at_once.layers == 1
    # At the first exit no K/V differ yet, so both modes say what that exit says.
    first, last = found._choice[0], found._choice[-1]
    for row, length in enumerate(lengths):
        differ = sum(first[row, i] != last[row, i] for i in range(length))
        assert at_once.risks[row] == differ / length
    assert 0 < at_once.risks.mean() <= 1


@pytest.mark.parametrize("kv", ["deferred", "propagate"])
def test_the_risk_may_be_the_loss_that_is_added(kv):
    found, lengths = texts_of("patience", kv, risk_of="loss")
    risks = found.measure(1).risks
    for row, length in enumerate(lengths):
        added = found._loss[0, row, :length].mean() - found._loss[-1, row, :length].mean()
        assert risks[row] == pytest.approx(np.clip(added, 0, 1), abs=1e-5)
    assert (found.measure(3).risks < 1e-5).all()


def test_words_and_weights_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="--kv='no'"):
        texts_of("entropy", "no")
    with pytest.raises(ConfigError, match="--risk-of='words'"):
        texts_of("entropy", "deferred", risk_of="words")
    with pytest.raises(ConfigError, match="learned needs a classifier"):
        texts_of("learned", "deferred")


ENTRY = {"policy": "entropy", "kv": "deferred", "exits": [1, 2], "threshold": 0.1, "step": 5}


def test_thresholds_are_kept_by_policy_kv_and_exits(tmp_path):
    folder = RunFolder(tmp_path)
    assert read_policies(folder) == []
    others = [ENTRY | {"kv": "propagate", "threshold": 0.2}, ENTRY | {"exits": [2]}]
    for entry in (ENTRY, *others, ENTRY | {"threshold": 0.3}):
        store_policy(folder, entry)
    assert read_policies(folder) == [*others, ENTRY | {"threshold": 0.3}]
    assert load_threshold(folder, "entropy", "deferred", (1, 2), 5) == 0.3
    with pytest.raises(ConfigError, match="calibrated for step 5, and this is step 6"):
        load_threshold(folder, "entropy", "deferred", (1, 2), 6)
    with pytest.raises(ConfigError, match="layerskip calibrate .*--exit-when=margin"):
        load_threshold(folder, "margin", "deferred", (1, 2), 5)
    for damaged in ("{", "[]", '{"policies": [{"policy": "entropy"}]}', '{"policies": [3]}'):
        folder.exit_policies_file.write_text(damaged)
        with pytest.raises(UserError, match=r"exit_policies.json is damaged"):
            store_policy(folder, ENTRY)
        assert folder.exit_policies_file.read_text() == damaged


def test_the_verb_stores_what_it_found(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    arguments = ["calibrate", f"--workdir={workdir}", "--tokens=20", "--exits=1,2"]
    figures = tmp_path / "figures.json"
    more = ["--risk=0.9", "--confidence=0.5", f"--json={figures}"]
    assert main([*arguments, "--exit-when=patience", "--kv=deferred", *more]) == 0
    folder, found = RunFolder(workdir), json.loads(figures.read_text())
    assert load_threshold(folder, "patience", "deferred", (1, 2), 12) == found["threshold"]
    assert "texts held out: risk" in capsys.readouterr().out
    # Half of the documents of the validation set, and the other half.
    assert abs(found["held_out"]["texts"] - found["texts"]) <= 1
    assert {"tested"} == found.keys() - read_policies(folder)[0].keys()
    assert main([*arguments, "--exit-when=entropy", "--kv=propagate", *more]) == 0
    assert [entry["policy"] for entry in read_policies(folder)] == ["patience", "entropy"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--exit-when=entropy"], "texts to calibrate on are too few"),
        (["--exit-when=entrop"], "Did you mean 'entropy'"),
        (["--exit-when=entropy", "--risk=1.5"], "--risk=1.5 must be in"),
        (["--exit-when=entropy", "--exits=1,4"], "exits=4 must be at most 3"),
        (["--exit-when=entropy", "--tokens=400"], "--tokens=400 must be at most 65"),
        (["--exit-when=learned", "--risk=0.9", "--confidence=0.5"], "needs a classifier"),
    ],
)
def test_the_verb_refuses(finished, capsys, options, message):
    assert main(["calibrate", f"--workdir={finished}", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (finished / "exit_policies.json").exists()
