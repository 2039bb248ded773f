"""A model ready to generate: buckets, the programs compiled for them, results."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layerskip_jax.decoding.adaptive import Depth, DepthCounts, no_depth_counts, no_waiting
from layerskip_jax.decoding.autoregressive import (
    PREFILL_CHUNK,
    beyond_newest,
    prefill,
    read_for_drafts,
)
from layerskip_jax.decoding.cache import Cache, cache_slots, layer_slots
from layerskip_jax.decoding.exit_policy import candidate_exits
from layerskip_jax.decoding.sampling import Sampling
from layerskip_jax.decoding.sequences import Limits, SequenceState, stop_table
from layerskip_jax.decoding.weights import (
    DecoderWeights,
    decoder_weights,
    pays_for_panels,
    place_weights,
    reduced_head,
)
from layerskip_jax.generation.loop import (
    Adapting,
    Arm,
    Costs,
    Evidence,
    Generating,
    advance,
    advance_adaptive,
    best_arm,
    layers_read,
    lookahead,
    no_counts,
    propose,
    settle,
)
from layerskip_jax.generation.options import (
    PAIR_MODES,
    DepthRun,
    Drafting,
    Generation,
    Request,
    read_stop_below,
)
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.model.transformer import Transformer
from layerskip_jax.schema import ConfigError, UserError, require, require_whole
from layerskip_jax.self_speculation import StopBelow

SMALLEST_BUCKET = 16
COST_CYCLES = 6
ASK_CYCLES = 32
STOP_TABLE = (8, 4)


def bucket(length: int, most: int) -> int:
    """Returns the padded size for `length`: a power of two, or `most` if that is less.

    Few sizes mean few programs to compile.
    """
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), most)


def prompt_bucket(length: int, most: int) -> int:
    """Returns the padded size of prompts: as `bucket`, in whole chunks where there are several."""
    size = bucket(length, most)
    return size if size <= PREFILL_CHUNK else -(-size // PREFILL_CHUNK) * PREFILL_CHUNK


def default_pairs(num_layers: int) -> tuple[tuple[int, int], ...]:
    """Returns pairs (E, G) for `auto`: short and long drafts by an eighth, a quarter, a half."""
    exits = sorted({max(1, num_layers // n) for n in (8, 4, 2)} - {num_layers})
    return tuple((exit_layer, length) for exit_layer in exits for length in (2, 5))


class StreamEvent(NamedTuple):
    """A piece of a stream: drafts, which the next piece replaces, or tokens for good."""

    is_draft: bool
    tokens: list[int]


class _Programs(NamedTuple):
    read: jax.stages.Compiled
    read_for_drafts: jax.stages.Compiled | None  # by the draft model
    advance: jax.stages.Compiled


class _Job(NamedTuple):
    """A request as arrays, and what its programs are compiled for."""

    prompts: np.ndarray
    lengths: np.ndarray
    limits: Limits
    sampling: Sampling | None
    arms: tuple[Arm, ...]
    capacity: int
    acceptance: str
    depth: Depth | None
    threshold: np.ndarray
    stop_below: StopBelow | None
    has_window: bool

    @property
    def evidence_key(self) -> tuple:
        """What evidence about arms holds for."""
        stop = self.stop_below
        return self.arms, None if stop is None else (float(stop.threshold), stop.score)

    @property
    def by_draft_model(self) -> bool:
        """Whether a second model drafts."""
        return self.arms[0].exit_layer == 0

    @property
    def lookahead(self) -> int:
        return lookahead(self.arms, 0 if self.depth is None else self.depth.lookahead)

    @property
    def slots(self) -> int:
        """Positions that a row's cache has room for."""
        return cache_slots(self.prompts.shape[1] + self.capacity + self.lookahead)

    @property
    def beyond(self) -> int:
        """The most tokens that a pass writes beyond a row's newest."""
        return beyond_newest(self.prompts.shape[1], self.lookahead)

    @property
    def cache_key(self) -> tuple:
        """What the shapes of a cache depend on."""
        return self.prompts.shape[0], self.slots, self.beyond if self.has_window else 0

    @property
    def state_key(self) -> tuple:
        """What the shapes of a generation depend on."""
        return (
            *self.cache_key,
            self.capacity + self.lookahead,
            self.limits.stop.shape,
            self.sampling is None,
        )


class Generator:
    """Decodes with one model.

    Programs are compiled for what it meets, and kept: those that read prompts for each bucket of
    batch, prompt length, new tokens and stop sequences, and the loops for each mode, E and G
    beside. For `auto` it measures once what a cycle of each pair costs, and remembers from call to
    call how often drafts were accepted.

    Attributes:
      config: the model's shapes.
      weights: laid out for decoding.
      draft_config: the shapes of the model that drafts in mode `draft_model`; None without one.
      draft_weights: its weights.
      compilations: programs compiled so far, those that read prompts and loops.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        mesh: Mesh | None = None,
        draft_tokens: Sequence[int] | None = None,
        draft_model: Transformer | None = None,
    ):
        """Lays the weights of `model` out for decoding.

        Args:
          model: any parameters.
          mesh: with the axes `data` (rows) and `tensor` (heads, MLP, vocabulary); None decodes on
            one device.
          draft_tokens: the only tokens that are drafted, such as the most frequent ones of a
            corpus; the fewer, the cheaper the drafts, and the output stays what it is.
          draft_model: a second, smaller model of the same tokens, to draft in mode `draft_model`.

        Raises:
          ConfigError: the vocabularies differ in size, `draft_tokens` are not in it, or a model
            cannot be split over the mesh.
          UserError: a parameter is not finite.
        """
        self.config: ModelConfig = model.config
        self.draft_config: ModelConfig | None = None
        self.draft_weights: DecoderWeights | None = None
        self.compilations = 0
        self._mesh = mesh
        self._programs: dict = {}
        self._costs: dict = {}
        self._evidence: dict = {}
        tokens = None
        if draft_tokens is not None:
            for token in draft_tokens:
                require_whole("draft_tokens", token)
            tokens = sorted(set(map(int, draft_tokens)))
            require(
                bool(tokens) and 0 <= tokens[0] and tokens[-1] < self.config.vocab_size,
                f"draft_tokens must be some of the tokens 0..{self.config.vocab_size - 1}",
            )
        if draft_model is not None:
            self.draft_config = draft_model.config
            require(
                self.draft_config.vocab_size == self.config.vocab_size,
                f"the draft model has a vocabulary of {self.draft_config.vocab_size} tokens and "
                f"the model one of {self.config.vocab_size}; what one drafts must be the other's "
                "tokens, so take two models of one tokenizer",
            )
        self._draft_tokens = tokens
        self.weights = _lay_out(model, mesh, tokens)
        if draft_model is not None:
            try:
                self.draft_weights = _lay_out(draft_model, mesh, tokens)
            except (ConfigError, UserError) as error:
                raise type(error)(f"the draft model: {error}") from error

    def reload(self, model: Transformer) -> None:
        """Takes the parameters of another model of the same shapes; no program is made anew.

        Raises:
          UserError: a parameter is not finite.
        """
        self.weights = _lay_out(model, self._mesh, self._draft_tokens)

    def unload(self) -> None:
        """Gives the memory of the weights back, until `reload`."""
        self.weights = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.weights
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        ended: Callable[[int, list[int]], bool] | None = None,
        **options,
    ) -> Generation:
        """Continues each prompt.

        Args:
          prompts: token ids, a list a row; lengths may differ.
          max_new_tokens: the most new tokens a row gets.
          ended: asked every `ASK_CYCLES` cycles of each row that goes on, by its index and its new
            tokens so far, for what ids alone do not say; true ends the row.
          **options: the other attributes of `Request`.

        Raises:
          ConfigError: before anything is compiled, naming the value and the remedy.
          UserError: the logits were not finite.
        """
        request = Request(prompts, max_new_tokens, **options)
        job, programs, costs, evidence = self._ready(request)
        most_cycles = ASK_CYCLES if ended else np.iinfo(np.int32).max
        rest = self._rest(job, costs, most_cycles)
        begin = time.perf_counter()
        state, limits, sampling = self._read_prompts(job, programs, job.limits, evidence)
        jax.block_until_ready(state)
        first = time.perf_counter() - begin
        state = programs.advance(self.weights, state, limits, sampling, *rest)
        while ended is not None:
            most = self._after_asking(state, job, ended, len(prompts))
            if most is None:
                break
            limits = limits._replace(max_new_tokens=self._on_device(most, "data"))
            state = programs.advance(self.weights, state, limits, sampling, *rest)
        jax.block_until_ready(state.sequences.tokens)
        seconds = time.perf_counter() - begin
        sequences = jax.device_get(state.sequences)
        real = len(prompts)
        tokens = [
            self._checked(row[:n].tolist())
            for row, n in zip(sequences.tokens[:real], sequences.count[:real], strict=True)
        ]
        if job.depth is not None:
            counts = jax.device_get(state.counts)
            read = self._bytes_read_adaptively(job.depth, counts)
            run = _depth_run(job.depth, counts, self.config.num_layers)
            return Generation(tokens, seconds, first, read, depth=run)
        counts, self._evidence[job.evidence_key] = jax.device_get((state.counts, state.evidence))
        drafting = None
        if request.mode in (*PAIR_MODES, "auto"):
            drafting = _drafting(job.arms, sum(map(len, tokens)) - real, counts)
        passes = counts.cycles.max(axis=1)  # a pass is for all rows that are not done
        made = counts.made.max(axis=1)
        read = sum(
            self._bytes_read(*numbers)
            for numbers in zip(job.arms, passes.tolist(), made.tolist(), strict=True)
        )
        return Generation(tokens, seconds, first, read, drafting)

    def _checked(self, tokens: list[int]) -> list[int]:
        """Returns new tokens, none of which stands for logits that are not finite.

        Raises:
          UserError: one does (see `likeliest`).
        """
        for index, token in enumerate(tokens):
            if token >= self.config.vocab_size:
                raise UserError(
                    f"the logits of new token {index + 1} are not finite, so there is no token: "
                    f"in {self.config.dtype} the computation overflows, although every weight is "
                    "finite; compute in float32 (--dtype=float32), or take other weights"
                )
        return tokens

    def _after_asking(
        self,
        state: Generating | Adapting,
        job: _Job,
        ended: Callable[[int, list[int]], bool],
        real: int,
    ) -> np.ndarray | None:
        """Returns the most new tokens of each row, now that `ended` was asked; None if all end."""
        tokens, counts, done = jax.device_get(
            (state.sequences.tokens, state.sequences.count, state.sequences.done)
        )
        most, going_on = job.limits.max_new_tokens.copy(), False
        for row in range(real):
            if done[row]:
                continue
            if ended(row, self._checked(tokens[row, : counts[row]].tolist())):
                most[row] = counts[row]
            else:
                going_on = True
        return most if going_on else None

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, **options
    ) -> Iterator[StreamEvent]:
        """Continues one prompt, cycle by cycle; the tokens are those of `generate`.

        Args:
          prompt: token ids.
          max_new_tokens: the most new tokens.
          **options: the other attributes of `Request`.

        Yields:
          Drafts as soon as they are made, then the tokens that take their place.

        Raises:
          ConfigError: at the first item, before anything is compiled.
        """
        request = Request([prompt], max_new_tokens, **options)
        job, programs, costs, evidence = self._ready(request)
        with self._on_mesh():
            state, limits, sampling = self._read_prompts(job, programs, job.limits, evidence)
            costs_there, stop_below = self._on_device((costs, job.stop_below))
            shown, index = 0, 0
            while True:
                count, done, tokens = jax.device_get(
                    (state.sequences.count[0], state.sequences.done[0], state.sequences.tokens[0])
                )
                yield StreamEvent(False, self._checked(tokens[shown:count].tolist()))
                shown = count
                if done:
                    if job.depth is None:
                        self._evidence[job.evidence_key] = jax.device_get(state.evidence)
                    return
                if len(job.arms) > 1:
                    index = int(best_arm(job.arms, state.evidence, costs_there))
                if job.arms[index].draft_length == 0:
                    forced = self._rest(job, _only(job.arms, index), 1)
                    state = programs.advance(self.weights, state, limits, sampling, *forced)
                    continue
                drafting, settling = self._halves(job, index)
                drafts, state = drafting(
                    self.weights, state, sampling, stop_below, self._drafter(job)
                )
                made = drafts.tokens.shape[1] if drafts.made is None else int(drafts.made)
                yield StreamEvent(True, jax.device_get(drafts.tokens[0]).tolist()[:made])
                state = settling(self.weights, state, drafts, limits, sampling)

    def check(self, request: Request) -> None:
        """Raises ConfigError where this cannot be asked of this model."""
        request.check(self.config, self.draft_config)
        asks = {}
        if request.mode == "adaptive":
            asks[f"exit_when={str(request.policy)!r}"] = request.policy.name == "learned"
        if request.stop_below is not None:
            score = read_stop_below(request.stop_below)[1]
            asks[f"stop_below={request.stop_below!r}"] = score == "learned"
        for asked, classifier in asks.items():
            require(
                not classifier or self.weights.classifier is not None,
                f"{asked} asks a classifier, and the model has none (docs/training.md trains one); "
                "take what needs none, such as exit_when='margin:0.5' or stop_below=0.5",
            )

    def _ready(self, request: Request) -> tuple[_Job, _Programs, Costs, Evidence]:
        """Checks a request; returns it as arrays, its programs, and what arms are chosen by."""
        self.check(request)
        job = self._job(request)
        self._check_memory(job)
        programs = self._compiled(job)
        costs = self._cost(job)
        return job, programs, costs, self._evidence.get(job.evidence_key, _no_evidence(job.arms))

    def _halves(self, job: _Job, index: int):
        """Returns the two halves of a cycle of an arm as programs of their own."""
        key = ("halves", job.arms, index, job.acceptance)
        if key not in self._programs:
            drafting = functools.partial(propose, arm=job.arms[index], acceptance=job.acceptance)
            settling = functools.partial(settle, arms=job.arms, index=index)
            self._programs[key] = (
                jax.jit(drafting, donate_argnums=1),
                jax.jit(settling, donate_argnums=1),
            )
        return self._programs[key]

    def _job(self, request: Request) -> _Job:
        """Pads a request to its bucket."""
        context = self.config.max_sequence_length
        real = len(request.prompts)
        batch = 1 << (real - 1).bit_length()
        if self._mesh is not None:
            shards = self._mesh.shape["data"]
            batch = -(-batch // shards) * shards
        width = prompt_bucket(max(map(len, request.prompts)), context)
        prompts = np.zeros((batch, width), np.int32)
        for row, prompt in zip(prompts, request.prompts, strict=False):
            row[: len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in request.prompts] + [1] * (batch - real))
        # Rows of padding have no room for a token, and are done before they begin.
        most = np.array([int(request.max_new_tokens)] * real + [0] * (batch - real))
        stop = [list(sequence) for sequence in request.stop]
        if request.end_token is not None:
            stop.append([request.end_token])
        # An end token alone, or room for most lists of stop sequences: few sizes to compile for.
        sizes = len(stop), max(map(len, stop), default=0)
        least = (1, 1) if max(sizes) <= 1 else STOP_TABLE
        rows, columns = (
            max(size, 1 << (n - 1).bit_length() if n else 1)
            for size, n in zip(least, sizes, strict=True)
        )
        table = stop_table(stop, rows, columns)
        sampling = None
        if request.temperature > 0:
            sampling = Sampling(
                np.float32(request.temperature),
                np.int32(min(request.top_k or self.config.vocab_size, self.config.vocab_size)),
                np.float32(request.top_p),
                (request.seed + np.arange(batch)).astype(np.uint32),
            )
        stop_below = None
        if request.stop_below is not None:
            threshold, score = read_stop_below(request.stop_below)
            stop_below = StopBelow(np.float32(threshold), score)
        layers = self.config.num_layers
        arms = {
            "plain": lambda: [(layers, 0)],
            "early_exit": lambda: [(request.exit_layer, 0)],
            "self_speculative": lambda: [(request.exit_layer, request.draft_length)],
            "draft_model": lambda: [(0, request.draft_length)],
            "auto": lambda: [(layers, 0), *(request.pairs or default_pairs(layers))],
            "adaptive": lambda: [(layers, 0)],
        }[request.mode]()
        depth, threshold = None, 0.0
        if request.mode == "adaptive":
            exits = None if request.exits is None else tuple(request.exits)
            depth = Depth(
                request.policy.name, candidate_exits(layers, exits), request.kv, request.room,
                request.falling,
            )  # fmt: skip
            threshold = request.policy.threshold
        return _Job(
            prompts,
            lengths.astype(np.int32),
            Limits(most.astype(np.int32), table),
            sampling,
            tuple(Arm(*arm) for arm in arms),
            bucket(int(request.max_new_tokens), context),
            request.acceptance,
            depth,
            np.array(threshold, np.float32),
            stop_below,
            any(config.sliding_window for config in (self.config, self.draft_config) if config),
        )

    def _compiled(self, job: _Job) -> _Programs:
        layers = layers_read(job.arms, self.config.num_layers)
        reads = ("read", job.prompts.shape[1], layers, *job.state_key)
        drafter_reads = ("read for drafts", job.prompts.shape[1], *job.cache_key)
        early = None if job.stop_below is None else job.stop_below.score
        loops = ("advance", job.arms, job.acceptance, job.depth, early, *job.state_key)
        arguments = self._inputs(job, job.limits)
        with self._on_mesh():
            if reads not in self._programs:
                read = functools.partial(
                    prefill,
                    config=self.config,
                    num_layers=layers,
                    capacity=job.capacity,
                    lookahead=job.lookahead,
                )
                self._programs[reads] = jax.jit(read).lower(self.weights, *arguments).compile()
                self.compilations += 1
            if job.by_draft_model and drafter_reads not in self._programs:
                read = functools.partial(
                    read_for_drafts,
                    config=self.draft_config,
                    capacity=job.capacity,
                    lookahead=job.lookahead,
                )
                self._programs[drafter_reads] = (
                    jax.jit(read).lower(self.draft_weights, *arguments[:2]).compile()
                )
                self.compilations += 1
            if loops not in self._programs:
                state = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(
                        leaf.shape, leaf.dtype, sharding=leaf.sharding
                    ),
                    self._begin(
                        job,
                        *self._programs[reads].out_info,
                        self._programs[drafter_reads].out_info if job.by_draft_model else None,
                        _no_evidence(job.arms),
                    ),
                )
                shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
                rest = self._rest(job, _no_costs(job.arms), 0)
                go_on = functools.partial(advance, arms=job.arms, acceptance=job.acceptance)
                if job.depth is not None:
                    go_on = functools.partial(advance_adaptive, depth=job.depth)
                self._programs[loops] = (
                    jax.jit(go_on, donate_argnums=1, out_shardings=shardings)
                    .lower(self.weights, state, *arguments[2:], *rest)
                    .compile()
                )
                self.compilations += 1
        return _Programs(
            self._programs[reads],
            self._programs[drafter_reads] if job.by_draft_model else None,
            self._programs[loops],
        )

    def _drafter(self, job: _Job) -> DecoderWeights | None:
        """Returns the weights that a job drafts with beside the model's own, None if none."""
        return self.draft_weights if job.by_draft_model else None

    def _rest(self, job: _Job, costs: Costs, most: int) -> tuple:
        """Returns what `_Programs.advance` takes last, there: how to choose, and how far to go."""
        if job.depth is not None:
            return self._on_device((job.threshold, np.int32(most)))
        return *self._on_device((costs, np.int32(most), job.stop_below)), self._drafter(job)

    def _begin(
        self,
        job: _Job,
        sequences: SequenceState,
        cache: Cache,
        draft_cache: Cache | None,
        evidence: Evidence,
    ) -> Generating | Adapting:
        """Returns what has read the prompts, with counts of nothing yet, there."""
        if job.depth is None:
            counts = no_counts(job.arms, job.prompts.shape[0])
            return Generating(
                sequences,
                cache,
                self._on_device(counts, None, "data"),
                self._on_device(evidence),
                draft_cache,
            )
        rows, config = job.prompts.shape[0], self.config
        waiting = no_waiting(job.depth, rows, config.model_dim, config.compute_dtype)
        counts = no_depth_counts(job.depth, rows)
        left = self._on_device(counts.left, "data")
        return Adapting(
            sequences,
            cache,
            None if waiting is None else self._on_device(waiting, "data"),
            self._on_device(counts)._replace(left=left),
        )

    def _inputs(self, job: _Job, limits: Limits) -> tuple:
        """Returns prompts, their lengths, limits and sampling, there."""
        prompts, lengths, most = self._on_device(
            (job.prompts, job.lengths, limits.max_new_tokens), "data"
        )
        limits = Limits(most, self._on_device(limits.stop))
        if job.sampling is None:
            return prompts, lengths, limits, None
        seeds = self._on_device(job.sampling.seed, "data")
        return prompts, lengths, limits, self._on_device(job.sampling)._replace(seed=seeds)

    def _read_prompts(
        self, job: _Job, programs: _Programs, limits: Limits, evidence: Evidence
    ) -> tuple[Generating | Adapting, Limits, Sampling | None]:
        """Returns a generation with each row's first token, and its limits and sampling there."""
        prompts, lengths, limits, sampling = self._inputs(job, limits)
        sequences, cache = programs.read(self.weights, prompts, lengths, limits, sampling)
        draft_cache = None
        if programs.read_for_drafts is not None:
            draft_cache = programs.read_for_drafts(self.draft_weights, prompts, lengths)
        return self._begin(job, sequences, cache, draft_cache, evidence), limits, sampling

    def _cost(self, job: _Job) -> Costs:
        """Returns the seconds of a cycle of each arm, measured once where there are several."""
        if len(job.arms) == 1:
            return _no_costs(job.arms)
        stop = job.stop_below
        key = (job.prompts.shape[0], job.arms, job.sampling is None, stop and stop.score)
        if key not in self._costs:

            def measured(job: _Job) -> np.ndarray:
                arms = range(len(job.arms))
                seconds = [min(self._time_cycle(job, arm) for _ in range(2)) for arm in arms]
                return np.array(seconds, np.float32)

            if stop is None:
                longest = measured(job)
                self._costs[key] = Costs(longest, longest)
            else:
                # No score is below -1, and each is below 2: drafting never ends early, or at once.
                ends = [
                    job._replace(stop_below=StopBelow(np.float32(threshold), stop.score))
                    for threshold in (2, -1)
                ]
                self._costs[key] = Costs(*map(measured, ends))
        return self._costs[key]

    def _time_cycle(self, job: _Job, arm: int) -> float:
        programs = self._compiled(job)
        forced = _only(job.arms, arm)
        stop = np.full_like(job.limits.stop, -2)
        most = np.full_like(job.limits.max_new_tokens, job.capacity)
        cycles = max(1, min(COST_CYCLES, (job.capacity - 1) // (job.arms[arm].draft_length + 1)))
        rest = self._rest(job, forced, cycles)
        state, limits, sampling = self._read_prompts(
            job, programs, Limits(most, stop), _no_evidence(job.arms)
        )
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state = programs.advance(self.weights, state, limits, sampling, *rest)
        jax.block_until_ready(state.sequences.count)
        return (time.perf_counter() - begin) / cycles

    def _bytes_read(self, arm: Arm, cycles: int, made: int) -> int:
        """Returns the weights that cycles with so many drafts in all read on one device."""
        weights, drafter = self.weights, self.weights
        head = _nbytes(weights.any_head)
        layers = [_nbytes(layer) for layer in weights.layers]
        early, late = sum(layers[: arm.exit_layer]), sum(layers[arm.exit_layer :])
        if arm.exit_layer == 0:
            drafter = self.draft_weights
            early = sum(map(_nbytes, drafter.layers))
        reduced = drafter.draft_head
        draft_head = _nbytes(drafter.any_head if reduced is None else reduced.matrix)
        adapter = _nbytes((weights.adapters or {}).get(arm.exit_layer))
        if arm.draft_length:
            draft_head += adapter
        else:
            head += adapter
        cycle = early + head + (late if arm.draft_length else 0)
        total = cycle * cycles + (early + draft_head) * made
        return total // (1 if self._mesh is None else self._mesh.shape["tensor"])

    def _bytes_read_adaptively(self, depth: Depth, counts: DepthCounts) -> int:
        """Returns the weights that one device read for what these counts say.

        Of a segment that nobody ran, `propagate` reads what makes keys and values.
        """
        weights, config = self.weights, self.config
        kv_share = 2 / (2 + config.num_heads / config.num_kv_heads)
        total = 0
        for (first, last), ran in zip(
            depth.segments(config.num_layers), counts.ran.tolist(), strict=True
        ):
            for layer in weights.layers[first:last]:
                total += ran * _nbytes(layer)
                if depth.kv == "propagate":
                    total += (int(counts.passes) - ran) * int(kv_share * _nbytes(layer.qkv))
        heads = int(counts.ran.sum()) if depth.kind.reads_logits else int(counts.passes)
        total += heads * _nbytes(weights.any_head)
        return total // (1 if self._mesh is None else self._mesh.shape["tensor"])

    def _on_mesh(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _on_device(self, arrays, *axes: str | None):
        """Puts arrays on the device, or on a mesh with their axes split over those named."""
        if self._mesh is None:
            return jax.device_put(arrays)
        return jax.device_put(arrays, NamedSharding(self._mesh, PartitionSpec(*axes)))

    def _check_memory(self, job: _Job) -> None:
        """Refuses a batch whose cache cannot fit beside the weights, those of both models."""
        slots = job.slots
        row = _cache_bytes(self.config, slots, job.beyond)
        if job.by_draft_model:
            row += _cache_bytes(self.draft_config, slots, job.beyond)
        weights = _nbytes(self.weights) + _nbytes(self.draft_weights)
        devices = 1 if self._mesh is None else self._mesh.size
        needed = (row * job.prompts.shape[0] + weights) / devices
        limit = device_memory()
        require(
            needed <= limit,
            f"{job.prompts.shape[0]} rows of {slots} positions need a cache of "
            f"{row * job.prompts.shape[0] / 2**30:.1f} GiB beside {weights / 2**30:.1f} GiB of "
            f"weights, and the device has {limit / 2**30:.1f} GiB; give fewer prompts at a time, "
            "or fewer new tokens",
        )


def device_memory() -> int:
    """Returns the bytes of a device's memory, of a CPU the machine's."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _lay_out(model: Transformer, mesh: Mesh | None, tokens: list[int] | None) -> DecoderWeights:
    """Returns a model's weights where they decode, given the only tokens to draft."""
    panels = mesh is None and pays_for_panels(jax.devices()[0].platform)
    weights = decoder_weights(model, panels=panels)
    if tokens is not None:
        head = reduced_head(weights, jnp.asarray(tokens, jnp.int32))
        weights = weights._replace(draft_head=head)
    return weights if mesh is None else place_weights(weights, mesh, model.config.num_kv_heads)


def _cache_bytes(config: ModelConfig, slots: int, beyond: int) -> int:
    """Returns the bytes of one row's keys and values; arguments as of `layer_slots`."""
    size = jnp.dtype(config.compute_dtype).itemsize
    layers = range(config.num_layers)
    all_slots = sum(layer_slots(config, layer, slots, beyond) for layer in layers)
    return 2 * all_slots * config.num_kv_heads * config.head_dim * size


def _nbytes(weights) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(weights))


def _depth_run(depth: Depth, counts: DepthCounts, num_layers: int) -> DepthRun:
    return DepthRun(
        layers=(*depth.exits, num_layers),
        tokens=tuple(counts.left.sum(axis=0).tolist()),
        passes=tuple(counts.ran.tolist()),
        steps=int(counts.passes),
    )


def _no_evidence(arms: tuple[Arm, ...]) -> Evidence:
    return Evidence(*(np.zeros(len(arms), np.float32) for _ in Evidence._fields))


def _no_costs(arms: tuple[Arm, ...]) -> Costs:
    return Costs(*(np.ones(len(arms), np.float32) for _ in Costs._fields))


def _only(arms: tuple[Arm, ...], index: int) -> Costs:
    """Returns costs under which one arm is always the best."""
    costs = np.full(len(arms), 1e30, np.float32)
    costs[index] = 1
    return Costs(costs, costs)


def _drafting(arms: tuple[Arm, ...], tokens: int, counts) -> Drafting:
    drafts = np.array([arm.draft_length > 0 for arm in arms])
    cycles = counts.cycles.sum(axis=1)
    return Drafting(
        cycles=int(cycles[drafts].sum()),
        plain_cycles=int(cycles[~drafts].sum()),
        tokens=tokens,
        drafted=int(counts.drafted.sum()),
        accepted=int(counts.accepted.sum()),
        examined=tuple(counts.examined.sum(axis=(0, 1)).tolist()),
        kept=tuple(counts.kept.sum(axis=(0, 1)).tolist()),
    )
