"""Multiple choice by likelihood, at every exit and under exit policies (DeeBERT's experiment).

The score of a choice is the sum, or the mean, of the log-probabilities of its tokens after the
prompt. Under a policy each of those tokens leaves at its own exit, and its log-probability is read
there; keys and values are those of the whole model (`deferred`), so the prompt runs all layers.
Layers run are the mean over the tokens of all choices of all questions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from layerskip_jax.data.json_lines import json_values, read_named
from layerskip_jax.data.text import encode_prompt
from layerskip_jax.decoding.weights import DecoderWeights
from layerskip_jax.evaluation.calibration import ROWS, candidate_thresholds
from layerskip_jax.evaluation.policy_scores import first_sure, pad_length, read_exits
from layerskip_jax.model.config import ModelConfig
from layerskip_jax.schema import UserError, is_text, is_whole, require_choice

CHOICE_SCORES = ("sum", "mean")


class Question(NamedTuple):
    """A question, its choices as token ids.

    Attributes:
      prompts: of each choice, the ids before it; the same text, which may be cut otherwise.
      choices: the ids of each choice, at least one.
      answer: which choice is right.
    """

    prompts: list[list[int]]
    choices: list[list[int]]
    answer: int


def read_questions(
    path: Path, tokenizer: Tokenizer, *, end_token: int | None, context: int
) -> list[Question]:
    """Reads a JSON-lines file with `prompt`, `choices` and `answer`, an index from 0 or the text.

    Prompt and choice are tokenised together, as lm-eval does: spaces that end the prompt are read
    with the choice.

    Args:
      path: the file.
      tokenizer: the model's.
      end_token: what stands for an empty prompt.
      context: the most tokens that the model reads.

    Raises:
      UserError: the file cannot be read, holds no question, or a line is wrong; by its number.
    """
    name, questions = f"--choices={path}", []
    for where, found in json_values(read_named(path, name), name):
        question = _question(found, where, tokenizer, end_token)
        for prompt, choice in zip(question.prompts, question.choices, strict=True):
            # The last token is only predicted, never read.
            if len(prompt) + len(choice) > context + 1:
                raise UserError(
                    f"{where}: prompt and choice have {len(prompt) + len(choice)} tokens, and the "
                    f"context holds {context}; shorten the prompt"
                )
        questions.append(question)
    if not questions:
        raise UserError(f"{name} holds no question")
    return questions


def _question(found: Any, where: str, tokenizer: Tokenizer, end_token: int | None) -> Question:
    wanted = '{"prompt": TEXT, "choices": [TEXT, TEXT, ...], "answer": INDEX or TEXT}'
    if not isinstance(found, dict) or not {"prompt", "choices", "answer"} <= found.keys():
        raise UserError(f"{where} must be {wanted}")
    prompt, texts, answer = (found[name] for name in ("prompt", "choices", "answer"))
    if not is_text(prompt) or not isinstance(texts, list) or not all(map(is_text, texts)):
        raise UserError(f"{where}: prompt and choices must be text, as in {wanted}")
    if len(texts) < 2 or len(set(texts)) < len(texts):
        raise UserError(f"{where}: choices={texts!r} must be at least two, and differ")
    if is_text(answer) and answer in texts:
        answer = texts.index(answer)
    if not is_whole(answer) or not 0 <= answer < len(texts):
        raise UserError(
            f"{where}: answer={answer!r} must be one of the choices, or its index in "
            f"0..{len(texts) - 1}"
        )
    prompts, choices = [], []
    for text in texts:
        bare = prompt.rstrip()
        whole = encode_prompt(tokenizer, prompt + text)
        before = len(encode_prompt(tokenizer, bare))
        if before == 0:
            if end_token is None:
                raise UserError(f"{where}: the prompt is empty, and the model has no end token")
            whole, before = [end_token, *whole], 1
        if len(whole) <= before:
            raise UserError(f"{where}: the choice {text!r} has no token of its own")
        prompts.append(whole[:before])
        choices.append(whole[before:])
    return Question(prompts, choices, answer)


class _Choice(NamedTuple):
    """What was read of the tokens of one choice: losses `[L, T]`, scores by policy `[C, T]`."""

    loss: np.ndarray
    scores: dict[str, np.ndarray]


def score_choices(
    weights: DecoderWeights,
    config: ModelConfig,
    questions: Sequence[Question],
    *,
    exits: tuple[int, ...],
    policies: Sequence[str],
    score: str = "sum",
) -> dict:
    """Returns accuracy at every exit, and against mean layers run for each policy.

    Args:
      weights: the model's weights.
      config: shapes.
      questions: see `read_questions`.
      exits: the candidate exits of the policies, ascending.
      policies: those to try, over the grid that `calibrate` tests.
      score: `sum` or `mean` of a choice's log-probabilities.

    Returns:
      `{"exits": [{"layers", "accuracy"}, ...], "policies": {name: [{"threshold", "layers",
      "accuracy"}, ...]}}`, thresholds from the most careful on.

    Raises:
      ConfigError: `score` is neither.
      UserError: a log-probability is not finite.
    """
    require_choice("--choice-score", score, CHOICE_SCORES)
    read = _read_choices(weights, config, questions, exits, tuple(policies))
    reduce = np.sum if score == "sum" else np.mean

    def accuracy(scores: list[float]) -> float:
        right, start = 0, 0
        for question in questions:
            stop = start + len(question.choices)
            right += int(np.argmax(scores[start:stop])) == question.answer
            start = stop
        return right / len(questions)

    at_exits = [
        {
            "layers": index + 1,
            "accuracy": accuracy([-float(reduce(choice.loss[index])) for choice in read]),
        }
        for index in range(config.num_layers)
    ]
    layers_of = np.array([*exits, config.num_layers])
    # Of all choices' tokens, one after another, and where each choice ends.
    losses = np.concatenate([choice.loss for choice in read], axis=1)
    ends = np.cumsum([choice.loss.shape[1] for choice in read])[:-1]
    curves: dict[str, list[dict]] = {}
    for policy in policies:
        of_all = np.concatenate([choice.scores[policy] for choice in read], axis=1)
        curves[policy] = []
        for threshold in candidate_thresholds(policy, len(exits)):
            layers = layers_of[first_sure(of_all, threshold, policy)]
            loss = np.take_along_axis(losses, layers[None] - 1, axis=0)[0]
            scores = [-float(reduce(part)) for part in np.split(loss, ends)]
            curves[policy].append(
                {
                    "threshold": threshold,
                    "layers": float(layers.mean()),
                    "accuracy": accuracy(scores),
                }
            )
    return {"exits": at_exits, "policies": curves}


def _read_choices(weights, config, questions, exits, policies) -> list[_Choice]:
    """Returns what the model says of every choice, question by question."""
    rows = [
        (prompt, choice)
        for question in questions
        for prompt, choice in zip(question.prompts, question.choices, strict=True)
    ]
    # Rows of like length together, so that short ones are not padded to the longest.
    order = sorted(range(len(rows)), key=lambda index: -sum(map(len, rows[index])))
    found: dict[int, _Choice] = {}
    for start in range(0, len(order), ROWS):
        batch = order[start : start + ROWS]
        tokens = np.zeros((ROWS, pad_length(max(sum(map(len, rows[i])) for i in batch))), np.int32)
        for row, index in zip(tokens, batch, strict=False):
            ids = rows[index][0] + rows[index][1]
            row[: len(ids)] = ids
        readings = jax.device_get(
            read_exits(
                weights, jnp.asarray(tokens), config=config, exits=exits, policies=policies,
                also=tuple(range(1, config.num_layers)),
            )
        )  # fmt: skip
        for row, index in enumerate(batch):
            prompt, choice = rows[index]
            # The score of token n stands at n - 1.
            part = slice(len(prompt) - 1, len(prompt) + len(choice) - 1)
            loss = readings.loss[:, row, part].astype(np.float64)
            if not np.isfinite(loss).all():
                raise UserError(
                    f"a log-probability is not finite in {config.dtype}, although every weight is; "
                    "take another checkpoint with --step"
                )
            scores = {name: of_exits[:, row, part] for name, of_exits in readings.scores.items()}
            found[index] = _Choice(loss, scores)
    return [found[index] for index in range(len(rows))]
