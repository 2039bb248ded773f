"""What stands between an early exit and the shared head, and whether an exit is right: settings."""

import dataclasses

from layerskip_jax.schema import require, require_choice, require_count

TARGETS = ("last", "data")


def every_eighth(num_layers: int) -> tuple[int, ...]:
    """Returns the exits E below L that lie an eighth of the layers apart, where none are named."""
    return tuple(sorted({max(1, num_layers * n // 8) for n in range(1, 8)}))


@dataclasses.dataclass(frozen=True)
class ExitsConfig:
    """Exit adapters and the learned exit; none unless asked for.

    Attributes:
      adapters: the exits E, in 1..L-1 and ascending, that get an adapter: a norm of their own and a
        low-rank map before the shared head. Empty makes none.
      rank: r of the low-rank map, at least 1.
      learned: whether there is a classifier, one for all exits, of whether an exit's token is right
        (BERxiT, "learning to exit"); trained alone by `training.trainable=exits`, or beside the
        model at the exits that are on.
      target: what they learn from: `last`, the last layer's distribution and its likeliest token,
        or `data`, the text's own next token.
    """

    adapters: tuple[int, ...] = ()
    rank: int = 64
    learned: bool = False
    target: str = "last"

    def __post_init__(self):
        for exit_layer in self.adapters:
            require_count("adapters", exit_layer, 1)
        require(
            list(self.adapters) == sorted(set(self.adapters)),
            f"adapters={self.adapters} must name each exit once, in ascending order",
        )
        require_count("rank", self.rank, 1)
        require_choice("target", self.target, TARGETS)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.adapters) or self.learned

    def check_layers(self, num_layers: int) -> None:
        """Raises `ConfigError` unless a model of so many layers has these exits."""
        require(
            not self or num_layers > 1,
            "config.model.exits: a model of one layer has no early exit",
        )
        for exit_layer in self.adapters:
            require(
                exit_layer < num_layers,
                f"config.model.exits.adapters={self.adapters} must be in 1..{num_layers - 1}: the "
                f"model has {num_layers} layers, and the last one needs no adapter",
            )

    def trained(self, num_layers: int) -> tuple[int, ...]:
        """Returns the exits E that are scored when they are trained, ascending."""
        return self.adapters or every_eighth(num_layers)
