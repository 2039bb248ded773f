"""The arithmetic of a training step: what it should cost, against which it is measured.

Only matrix products count, two operations a multiply-add. For one row of S tokens:

    projections of a layer    2 S D (2 H h + 2 K h)      queries, output; keys, values
    its MLP                   2 S (3 D F)
    its attention             2 S (S + 1) H h            scores and values, causal

                              with a window w < S        2 (w (w + 1) + 2 w (S - w)) H h
    one exit                  2 M D V                    at the M positions that it is scored on

The backward pass costs twice the forward one. Rows that a layer drops, and exits that are off,
count nothing. Muon makes each matrix of m x n, m <= n, orthogonal in five turns of

    4 m m n + 2 m m m

whatever the batch.

Of parameters that a run leaves as they are (`training.trainable`), a layer's matrices cost no
gradient of their own, and where nothing before the head is trained, there is no backward pass.

Exits before a model that is left as it is (`training.trainable=exits`) take a forward pass of the
layers; at each exit the head forward and, for its adapter, backward to the states; the adapter

    2 M (2 D r)                      three times, forward and backward

the learned exit 2 M D, twice; and the last layer's head forward, where it is the target.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from layerskip_jax.config import RunConfig
from layerskip_jax.data.batch_sizes import BatchSizes
from layerskip_jax.early_exit_loss import EarlyExitConfig, exit_weights, scored_positions
from layerskip_jax.layer_dropout import LayerDropoutConfig, drop_probabilities
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import ModelDefinition
from layerskip_jax.ops.attention import computed_pairs, seen_pairs
from layerskip_jax.ops.remat import REMAT_POLICIES
from layerskip_jax.training.exits import classifier_positions
from layerskip_jax.training.muon import stacks
from layerskip_jax.training.step import StepMetrics
from layerskip_jax.training.trainable import trained
from layerskip_jax.training.width_transfer import is_vector, name_of

MFU_DEFINITION = (
    "MFU: matrix-product FLOPs that the step needs, over time and the devices' bfloat16 peak; "
    "causal attention counted once, what is computed again for the backward pass not counted, "
    "dropped rows and exits that are off not counted"
)


class StepFlops(NamedTuple):
    """Floating-point operations of one optimizer step, over the whole batch.

    Attributes:
      layers: projections and MLPs, forward and backward.
      attention: scores and values, causal.
      exits: the head, at every exit that is scored.
      recomputed: what rematerialisation, and attention's backward pass, compute a second time.
      masked: what the device computes beyond that although nothing needs it: attention above
        the diagonal, and dropped rows under the `mask` execution.
      optimizer: the matrix products of the optimizer; Muon's.
    """

    layers: float
    attention: float
    exits: float
    recomputed: float
    masked: float
    optimizer: float

    @property
    def needed(self) -> float:
        """What the step needs; the numerator of MFU."""
        return self.layers + self.attention + self.exits

    @property
    def computed(self) -> float:
        """What the device computes; the arithmetic that its time is compared with."""
        return self.needed + self.recomputed + self.masked + self.optimizer


@dataclasses.dataclass(frozen=True)
class CostModel:
    """FLOPs of a run's steps.

    Attributes:
      config: the run, its vocabulary known.
      sequence_length: S of its windows.
    """

    config: RunConfig
    sequence_length: int

    def step(
        self, layers_run: float, early_exits: float | int, rows: float | int | None = None
    ) -> StepFlops:
        """Returns the cost of a step.

        Args:
          layers_run: share of (layer, row) pairs that are not dropped.
          early_exits: exits below the last layer that are scored.
          rows: windows of its batch; None takes those of the full one.
        """
        model, length = self.config.model, self.sequence_length
        rows = float(self.config.training.batch_size if rows is None else rows)
        all_layers = rows * model.num_layers
        run = all_layers * layers_run
        matrices, down, attention = _layer_forward(model, length)
        # What lies above the diagonal; kernels skip it, a block at a time.
        square = scores_again = 0.0
        if model.attention in ("auto", "xla"):
            whole = max(self.config.mesh.shape.context, 1) == 1
            windows = [kind.window for kind in model.layer_kinds]
            computed = sum(computed_pairs(length, whole, window) for window in windows)
            square = attention * (computed / sum(seen_pairs(length, w) for w in windows) - 1)
            # Its backward pass makes the scores, one product of two, a second time.
            scores_again = (attention + square) / 2
        # These save what their backward pass needs under the name that the policy keeps.
        kernel_again = attention if model.attention in ("triton", "cudnn") else 0.0
        policy = REMAT_POLICIES[model.remat]
        own, back = _trained_share(model, self.config.training.trainable)
        again = scores_again + policy.again(matrices, down, attention + square, kernel_again)
        again *= back
        matrices_all = (1 + back + own) * matrices
        masked = run * (1 + 2 * back) * square
        if self.config.layer_dropout.execution == "mask":
            masked += (all_layers - run) * (
                matrices_all + (1 + 2 * back) * (attention + square) + again
            )
        if self.config.training.trainable == "exits":
            return self._exits_step(rows, matrices, attention, square)
        positions = scored_positions(self.config.early_exit, length)
        tokens = rows * (length + early_exits * positions)
        learned = 0.0
        if model.exits.learned:
            # Of a step without early exits none; an average step is taken for one with them.
            heads = early_exits + min(early_exits, 1) * (model.exits.target == "last")
            read = rows * classifier_positions(positions) * model.model_dim
            learned = 2.0 * read * (heads * model.vocab_rows + 2 * early_exits)
        return StepFlops(
            layers=run * matrices_all,
            attention=run * (1 + 2 * back) * attention,
            exits=6.0 * tokens * model.model_dim * model.vocab_rows + learned,
            recomputed=run * again,
            masked=masked,
            optimizer=self._optimizer(),
        )

    def _optimizer(self) -> float:
        if self.config.optimizer.name != "muon":
            return 0.0
        trainable = self.config.training.trainable
        return sum(stack.flops for stack in stacks(self.config.model, 1, trainable))

    def _exits_step(
        self, rows: float, matrices: float, attention: float, square: float
    ) -> StepFlops:
        """Returns the cost of a step that trains exits alone, given a layer's for one row."""
        model, exits = self.config.model, self.config.model.exits
        count = len(exits.trained(model.num_layers))
        tokens = rows * self.sequence_length
        head = 2.0 * tokens * model.model_dim * model.vocab_rows
        adapters = 3 * 4.0 * tokens * model.model_dim * exits.rank * len(exits.adapters)
        of_last = head if exits.target == "last" else 0.0
        learned = 2.0 * tokens * model.model_dim * count * exits.learned
        forward = count * head + of_last + adapters / 3 + learned
        return StepFlops(
            layers=rows * model.num_layers * matrices,
            attention=rows * model.num_layers * attention,
            # Only an adapter's gradient goes back through the head.
            exits=forward + len(exits.adapters) * head + adapters * 2 / 3 + learned,
            recomputed=forward,
            masked=rows * model.num_layers * square,
            optimizer=0.0,
        )

    @property
    def sizes(self) -> BatchSizes:
        """The windows of each step."""
        return BatchSizes.of(self.config.training)

    @property
    def at_full_batch(self) -> "CostModel":
        """The same without a batch ramp: every step has the full batch."""
        training = dataclasses.replace(self.config.training, batch_ramp=())
        return dataclasses.replace(self, config=dataclasses.replace(self.config, training=training))

    def done(self, metrics: StepMetrics, rows: float | int | None = None) -> StepFlops:
        """Returns the cost of a step that was taken, from its metrics on the host; see `step`."""
        early = int((metrics.exit_weights[:-1] > 0).sum())
        return self.step(float(metrics.layers_run), early, rows)

    def plain(self, rows: float | int | None = None) -> StepFlops:
        """Returns the cost of a step that drops nothing and scores the last layer; see `step`."""
        return self.step(1.0, 0, rows)

    @property
    def schedule(self) -> tuple[Float[np.ndarray, "T"], Int[np.ndarray, "T"]]:
        """The mean share of layers run, and the early exits scored, at every step of the run."""
        config = self.config
        # How rows are grouped is not in the schedule: one evaluation serves every layout.
        dropout = dataclasses.replace(config.layer_dropout, row_groups=1)
        total = config.training.steps
        return _schedule(dropout, config.early_exit, config.model.num_layers, total)

    def planned(self, first: int, last: int) -> StepFlops:
        """Returns the mean cost of the steps first..last-1 by the schedules, over the draws."""
        layers_run, early = (of_steps[first:last] for of_steps in self.schedule)
        if not self.config.training.batch_ramp:
            return self.step(float(layers_run.mean(dtype=np.float64)), float(early.mean()))
        # A step costs by its rows, times what it runs of them.
        rows = self.sizes.between(first, last).astype(np.float64)
        return self.step(
            float(np.average(layers_run, weights=rows)),
            float(np.average(early, weights=rows)),
            float(rows.mean()),
        )


@functools.lru_cache(maxsize=8)
def _trained_share(model: ModelConfig, trainable: str) -> tuple[float, int]:
    """Returns the share of the layers' matrices that is trained, and whether a gradient goes back.

    That is 1 where anything before the head is trained, else 0.
    """
    shapes = ModelDefinition(model).shapes
    part = trained(shapes, trainable)

    def size(tree):
        # Of the scales of norms, and of biases, there are no products.
        leaves = jax.tree_util.tree_leaves_with_path(tree.get("layers", {}))
        return sum(
            leaf.size
            for path, leaf in leaves
            if path[0].key in ("attention", "mlp") and not is_vector(name_of(path))
        )

    return size(part) / size(shapes), int("layers" in part or "embedding" in part)


def _layer_forward(model: ModelConfig, length: int) -> tuple[float, float, float]:
    """Returns a layer's matrices, of them the down-projection, and attention, for one row.

    Attention is the mean of the layers', where some see a window and others all.
    """
    width = model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    down = 2.0 * length * model.ffn_dim * model.model_dim
    matrices = 2.0 * length * model.model_dim * width + 3 * down
    kinds = model.layer_kinds
    pairs = sum(seen_pairs(length, kind.window) for kind in kinds) / len(kinds)
    attention = 4.0 * pairs * model.num_heads * model.head_dim
    return matrices, down, attention


@functools.lru_cache(maxsize=8)
def _schedule(
    dropout: LayerDropoutConfig, early_exit: EarlyExitConfig, num_layers: int, total: int
) -> tuple[np.ndarray, np.ndarray]:
    def at(step):
        p = drop_probabilities(dropout, num_layers, step, total)
        weights = exit_weights(early_exit, num_layers, step, total)
        return 1 - p.mean(), (weights[:-1] > 0).sum()

    every = jax.jit(lambda steps: jax.lax.map(at, steps, batch_size=4096))
    layers_run, early = jax.device_get(every(np.arange(total)))
    return layers_run, early
