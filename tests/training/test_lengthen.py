import dataclasses

import pytest

from layerskip_jax.config import OptimizerConfig, RunConfig, TrainingConfig
from layerskip_jax.early_exit_loss import EarlyExitConfig
from layerskip_jax.layer_dropout import LayerDropoutConfig
from layerskip_jax.training.lengthen import why_not
from tests.helpers import small_model


def _run(steps: int, **changes) -> RunConfig:
    run = RunConfig(
        model=small_model(),
        training=TrainingConfig(steps=steps, batch_size=8),
        layer_dropout=LayerDropoutConfig(0.2),
        early_exit=EarlyExitConfig("rotational", rotation_interval=2),
        optimizer=OptimizerConfig(schedule="wsd", warmup_steps=5, decay_fraction=0.2),
    )
    return dataclasses.replace(run, **changes)


def test_wsd_may_be_lengthened_until_its_decay():
    short, long = _run(100), _run(300)
    assert why_not(short, long, 0) == why_not(short, long, 80) == []
    # Its first step still is at the peak, but for rounding.
    assert why_not(short, long, 81) == [
        "config.optimizer.schedule='wsd', by which step 81 was another"
    ]
    # To an earlier end as well, as long as its decay has not begun by then.
    assert why_not(long, short, 80) == []
    assert why_not(long, short, 81) and why_not(long, short, 101) == ["101 steps are done"]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"layer_dropout": LayerDropoutConfig(0.2, time_schedule="exp")}, "time_schedule='exp'"),
        ({"layer_dropout": LayerDropoutConfig(0.2, time_schedule="trapezoid")}, "'trapezoid'"),
        ({"early_exit": EarlyExitConfig("gradual")}, "curriculum='gradual'"),
        ({"optimizer": OptimizerConfig(schedule="cosine", warmup_steps=5)}, "schedule='cosine'"),
        ({"optimizer": OptimizerConfig(schedule="constant", warmup_steps=200)}, "warmup_steps=200"),
    ],
)
def test_what_forbids_another_length_is_named(changes, named):
    reasons = why_not(_run(100, **changes), _run(300, **changes), 80)
    assert len(reasons) == 1 and named in reasons[0]


def test_what_is_off_forbids_nothing():
    off = {"layer_dropout": LayerDropoutConfig(0.0, time_schedule="exp")}
    assert why_not(_run(100, **off), _run(300, **off), 50) == []
