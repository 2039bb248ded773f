"""Rates that carry over from one width to another (Yang et al. 2022, arXiv:2203.03466).

What is tuned at the width D_0 holds at D = m D_0, where F, H and K grow with D and the size of a
head stays. In the terms of the paper's table 3, against what a model of that width has otherwise:

                                drawn       AdamW's rate    gradients
    embedding                   sqrt(m)     1               1 / m
    matrices of the layers      1           1 / m           1 / m
    norms, biases               1           1               1 / m
    head of its own             1 / sqrt(m) 1 / m           1
    head that is the embedding:
        final norm              1 / m       1 / m           1

so that what every parameter adds to the residual stream and the logits in a step is the same at
each width. A tied head needs its logits multiplied by 1 / m (table 8). That factor is in the scale
of the final norm: for Adam, a parameter times c that moves c times as fast is the same as one
before a factor c. So the model stays a plain Llama, wherever it is read.

Weight decay is `learning_rate * weight_decay` a step for every parameter, as at D_0: its memory
must not grow with m (Wang and Aitchison 2025, arXiv:2405.13698). Adam's `eps` is measured against
gradients as large as at D_0, since theirs shrink (Everett et al. 2024, arXiv:2407.05872).

Muon's step has the spectral norm that is right at every width, sqrt(outputs / inputs) (Yang, Simon
and Bernstein 2023, arXiv:2310.17813), where `muon_rms` is 0. Steps of the root mean square of
AdamW's have one that grows with sqrt(m), and take 1 / sqrt(m) of the rate.

Where the heads grow instead, from h_0 to h, scores are to be divided by h and not by its root. The
factor sqrt(h_0 / h) is in the queries: what they are drawn with and the rate of their matrix, or of
the norm's scale that comes after it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from layerskip_jax.config import OptimizerConfig
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.definition import Parameters


class Scaling(NamedTuple):
    """What a parameter has at this width, as multiples of what it has without.

    Attributes:
      drawn: of its first values.
      rate: of its learning rate.
      gradient: of its gradient, against that at the width where rates were tuned.
    """

    drawn: float = 1.0
    rate: float = 1.0
    gradient: float = 1.0


def is_vector(name: str) -> bool:
    """Whether a parameter of that name is the scale of a norm or a bias: neither decays."""
    last = name.rpartition(".")[2]
    return last == "scale" or last.endswith("_bias")


@dataclasses.dataclass(frozen=True)
class WidthTransfer:
    """What `config.optimizer.width_transfer` does to a model; false where it is off.

    Attributes:
      optimizer: its `width_transfer` is D_0, its `width_transfer_head_dim` h_0.
      model: of the width D.
    """

    optimizer: OptimizerConfig
    model: ModelConfig

    def __bool__(self) -> bool:
        return self.optimizer.width_transfer > 0

    def scaling(self, name: str) -> Scaling:
        """Returns the multiples of a parameter, by its name with dots."""
        m = self.model.model_dim / self.optimizer.width_transfer
        tied = self.model.tie_embeddings
        inner = Scaling(1.0, 1.0, 1 / m)
        # What the head reads has entries of the size 1 / m where it is tied, else of 1.
        final = Scaling(1 / m, 1 / m, 1.0) if tied else inner
        named = {
            "embedding": Scaling(m**0.5, 1.0, 1 / m),
            "head": Scaling(m**-0.5, 1 / m, 1.0),
            "final_norm.scale": final,
            **self._of_queries(m),
            "exits.scale": final,
            "exits.down": Scaling(1.0, 1 / m, 1.0),
            "exits.up": inner,
            "exits.weight": inner if tied else Scaling(1.0, 1 / m, 1.0),
            "exits.score_bias": Scaling(),
        }
        if name in named:
            return named[name]
        return inner if is_vector(name) else inner._replace(rate=1 / m)

    def _of_queries(self, m: float) -> dict[str, Scaling]:
        """Returns the multiples of what makes queries, in which a head's growth is."""
        before = self.optimizer.width_transfer_head_dim or self.model.head_dim
        factor = (before / self.model.head_dim) ** 0.5
        vector = Scaling(factor, factor, 1 / (m * factor))
        if self.model.qk_norm != "none":  # whose scale has the last word
            return {"layers.attention.q_norm.scale": vector}
        matrix = vector._replace(rate=factor / m)
        return {"layers.attention.q": matrix, "layers.attention.q_bias": vector}

    def drawn(self, parameters: Parameters) -> Parameters:
        """Returns the parameters that a run begins with, of those that any model does."""
        return self._scaled(parameters, lambda scaling: scaling.drawn)

    def of_adam(self, adam: optax.GradientTransformation) -> optax.GradientTransformation:
        """Returns Adam, before its decay and learning rate, for parameters of this width."""
        return self._around(
            adam,
            before=lambda scaling: 1 / scaling.gradient,  # so that eps counts as at D_0
            after=lambda scaling: scaling.rate,
        )

    def of_muon(self, muon: optax.GradientTransformation) -> optax.GradientTransformation:
        """Returns what makes Muon's steps, before decay and rate, for matrices of this width."""
        m = self.model.model_dim / self.optimizer.width_transfer if self else 1.0
        spectral = m**-0.5 if self.optimizer.muon_rms else 1.0
        return self._around(
            muon,
            before=lambda scaling: 1.0,  # its steps do not know how large gradients are
            after=lambda scaling: scaling.rate * m * spectral,
        )

    def _around(
        self,
        inner: optax.GradientTransformation,
        before: Callable[[Scaling], float],
        after: Callable[[Scaling], float],
    ) -> optax.GradientTransformation:
        """Returns a transformation between two factors; its state is the inner one's."""
        if not self:
            return inner

        def update(updates, state, parameters=None):
            updates, state = inner.update(self._scaled(updates, before), state, parameters)
            return self._scaled(updates, after), state

        return optax.GradientTransformation(inner.init, update)

    def _scaled(self, tree: Parameters, of: Callable[[Scaling], float]) -> Parameters:
        """Multiplies each leaf of a nest like the parameters; parts of it may be missing."""
        if not self:
            return tree

        def one(path, leaf):
            return leaf * of(self.scaling(name_of(path)))

        return jax.tree_util.tree_map_with_path(one, tree)


def name_of(path: tuple) -> str:
    """Returns the name, with dots, of the parameter at a path of a nest."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
