"""Choosing tokens: greedily, or at random from the processed distribution.

The processed distribution is softmax(logits / temperature), cut to the `top_k` likeliest
tokens, cut to the fewest likeliest ones that hold `top_p` of what is left, and normalised
again; in float32, whatever the temperature. Noise belongs to a row and a position, not to a
step of a loop: the
token at position n is argmax(log p + gumbel(row, n)), whoever chooses it. So drafts and the
whole model draw alike, and sampled tokens do not depend on the exit, on the draft length or
on the other rows (drafter-invariant sampling).

Thresholds are found by bisection over the bits of the numbers, with sums over the vocabulary
only: no sort, and nothing to gather where the vocabulary is split over devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

# What a position's noise is for; each use has its own.
TOKEN, ACCEPT, RESIDUAL = range(3)


class Sampling(NamedTuple):
    """How tokens are drawn, traced, so that no value of these compiles anew.

    Attributes:
      temperature: above 0.
      top_k: tokens kept; V keeps all.
      top_p: mass kept, in (0, 1]; 1 keeps all.
      seed: the seed of each row.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    seed: UInt32[Array, "B"]


def likeliest(scores: Float[Array, "... V"]) -> Int[Array, "..."]:
    """Returns the index of the highest score, of equals the lowest; V where it is not finite.

    No token has the id V: whoever finds it among tokens knows that scores were not finite. As two
    plain reductions, which a compiler splits over a split vocabulary; it would gather
    the scores for an argmax.
    """
    vocab = scores.shape[-1]
    best = jnp.max(scores, axis=-1, keepdims=True)
    is_best = (scores == best) & jnp.isfinite(best)
    return jnp.min(jnp.where(is_best, jnp.arange(vocab, dtype=jnp.int32), vocab), axis=-1)


def _ordered_bits(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Maps float32 to integers of the same order, both zeros to one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _highest_threshold(bits: UInt32[Array, "... V"], weight, enough) -> UInt32[Array, "... 1"]:
    """Returns the highest t for which the entries of at least t weigh `enough` together."""

    def try_bit(index, threshold):
        candidate = threshold | (jnp.uint32(1) << (31 - index))
        total = jnp.sum(jnp.where(bits >= candidate, weight, 0), axis=-1, keepdims=True)
        return jnp.where(total >= enough, candidate, threshold)

    start = jnp.zeros((*bits.shape[:-1], 1), jnp.uint32)
    return jax.lax.fori_loop(0, 32, try_bit, start)


def processed(logits: Float[Array, "... V"], sampling: Sampling) -> Float[Array, "... V"]:
    """Returns float32 log-probabilities of the processed distribution; -inf is cut off.

    Tokens as likely as the last one that is kept are kept too: those of the same logit, since a
    high temperature makes others as likely in float32 only.
    """
    logits = logits.astype(jnp.float32)
    bits = _ordered_bits(logits)
    # Of 0 and what is below it, the quotient is 0 or -inf at worst, however low the temperature.
    # A very high one has no reciprocal in float32, so what is cut off already must stay so.
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = jnp.where(jnp.isneginf(below), below, below / sampling.temperature)
    log_p = jax.nn.log_softmax(scaled)
    vocab = logits.shape[-1]

    def keep_top_k(log_p):
        kept = bits >= _highest_threshold(bits, jnp.int32(1), sampling.top_k)
        return jax.nn.log_softmax(jnp.where(kept, log_p, -jnp.inf))

    def keep_top_p(log_p):
        # By the sum itself, since rounding may leave it a little short of 1.
        p = jnp.exp(log_p)
        enough = jnp.minimum(sampling.top_p, 1) * p.sum(axis=-1, keepdims=True)
        enough = jnp.maximum(enough, jnp.finfo(jnp.float32).tiny)  # 0 would be enough of nothing
        kept = bits >= _highest_threshold(bits, p, enough)
        return jax.nn.log_softmax(jnp.where(kept, log_p, -jnp.inf))

    log_p = jax.lax.cond(sampling.top_k < vocab, keep_top_k, lambda x: x, log_p)
    return jax.lax.cond(sampling.top_p < 1, keep_top_p, lambda x: x, log_p)


def _keys(sampling: Sampling, positions: Int[Array, "B S"], use: int):
    def one(seed, row):
        key = jax.random.fold_in(jax.random.key(seed), use)
        return jax.vmap(lambda position: jax.random.fold_in(key, position))(row)

    return jax.vmap(one)(sampling.seed, positions)


def _with_noise(log_p, sampling: Sampling, positions, use: int = TOKEN) -> Float[Array, "B S V"]:
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, log_p.shape[-1:])))
    return log_p + noise(_keys(sampling, positions, use))


def draw(
    log_p: Float[Array, "B S V"],
    sampling: Sampling,
    positions: Int[Array, "B S"],
    use: int = TOKEN,
) -> Int[Array, "B S"]:
    """Draws a token for each position by the Gumbel-max trick, with the position's noise."""
    return likeliest(_with_noise(log_p, sampling, positions, use))


def choose(
    logits: Float[Array, "B S V"], positions: Int[Array, "B S"], sampling: Sampling | None
) -> Int[Array, "B S"]:
    """Chooses the tokens that will stand at `positions`: greedily where `sampling` is None."""
    return likeliest(contest(logits, positions, sampling))


def contest(
    logits: Float[Array, "B S V"], positions: Int[Array, "B S"], sampling: Sampling | None
) -> Float[Array, "B S V"]:
    """Returns what `choose` takes the highest of: logits, or log-probabilities with the noise."""
    if sampling is None:
        return logits
    return _with_noise(processed(logits, sampling), sampling, positions)


def lead(scores: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Returns by how much the highest of `scores` leads the second, as their sigmoid.

    Of logits it is the likeliest token's share of the two likeliest, p(first) / (p(first) +
    p(second)), from 0.5 on: what has to change for another token to be chosen.
    """
    scores = scores.astype(jnp.float32)
    ids = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    others = jnp.where(ids == likeliest(scores)[..., None], -jnp.inf, scores)
    return jax.nn.sigmoid(jnp.max(scores, axis=-1) - jnp.max(others, axis=-1))


def matching(drafts: Int[Array, "B G"], chosen: Int[Array, "B G1"]) -> Int[Array, "B"]:
    """Returns how many drafts agree with the whole model before the first that does not."""
    return _leading(drafts == chosen[:, :-1])


def reject(
    drafts: Int[Array, "B G"],
    draft_log_p: Float[Array, "B G V"],
    log_p: Float[Array, "B G1 V"],
    positions: Int[Array, "B G1"],
    sampling: Sampling,
    lengths: Int[Array, "B"] | None = None,
) -> tuple[Int[Array, "B G1"], Int[Array, "B"]]:
    """Rejection sampling (Leviathan et al. 2023, appendix A.1): the tokens of the whole model.

    Draft d of a position is kept while u q(d) < p(d), strictly. At the first that is not, a
    token is drawn from max(p - q, 0), normalised (from p where that is 0 throughout); after
    the last draft from p.

    Args:
      drafts: drawn from q.
      draft_log_p: log q of the draft model.
      log_p: log p of the whole model, one position more.
      positions: where the G + 1 tokens will stand.
      sampling: for its noise.
      lengths: how many of the drafts a row has, the first ones; None: all.

    Returns:
      G + 1 tokens, of which the accepted drafts and one more count, and how many drafts were
      accepted.
    """
    length = drafts.shape[1]
    q, p = jnp.exp(draft_log_p), jnp.exp(log_p)

    def of_drafts(x):
        return jnp.take_along_axis(x, drafts[..., None], axis=-1)[..., 0]

    uniform = jax.vmap(jax.vmap(jax.random.uniform))(_keys(sampling, positions[:, :length], ACCEPT))
    accepted = _leading(uniform * of_drafts(q) < of_drafts(p[:, :length]))
    if lengths is not None:
        accepted = jnp.minimum(accepted, lengths)
        q = jnp.where(jnp.arange(length)[:, None] < lengths[:, None, None], q, 0)

    def at_end(x):
        return jnp.take_along_axis(x, accepted[:, None, None], axis=1)

    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))  # nothing was drafted after the last draft
    left = jnp.maximum(at_end(p) - at_end(q), 0)
    left = jnp.where(left.sum(axis=-1, keepdims=True) > 0, left, at_end(p))
    place = jnp.take_along_axis(positions, accepted[:, None], axis=1)
    drawn = draw(jnp.log(left), sampling, place, RESIDUAL)
    is_draft = jnp.arange(length + 1) < accepted[:, None]
    return jnp.where(is_draft, jnp.pad(drafts, ((0, 0), (0, 1))), drawn), accepted


def _leading(agrees: Bool[Array, "B G"]) -> Int[Array, "B"]:
    return jnp.cumprod(agrees.astype(jnp.int32), axis=1).sum(axis=1)
