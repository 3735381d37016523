"""Whether prompts leave room for the response in the model's context, asked before anything is generated."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.base import Problem
from vespo_lightning.tasks.prompts import render_prompt


def room_for_responses(tokenizer: PreTrainedTokenizerBase, problems: Iterable[Problem], context: int) -> int:
    """Tokens that the longest prompt leaves in a context of ``context`` tokens.

    Raises:
        UserError: a prompt leaves none.
    """
    longest, problem = max(
        ((len(render_prompt(tokenizer, problem.prompt)), problem) for problem in problems), key=lambda pair: pair[0]
    )
    if longest >= context:
        raise UserError(
            f"prompt {problem.id} has {longest} tokens and leaves no room for a response in the model's context of "
            f"{context}; leave out long prompts (task), or take a model with a longer context (model.path)"
        )
    return context - longest


def check_response_length(
    key: str, max_new_tokens: int, tokenizer: PreTrainedTokenizerBase, problems: Iterable[Problem], context: int
) -> None:
    """Raises UserError, naming ``key``, when a prompt and ``max_new_tokens`` exceed the context together."""
    room = room_for_responses(tokenizer, problems, context)
    if max_new_tokens > room:
        raise UserError(
            f"{key}={max_new_tokens} is too long: the model's context of {context} tokens leaves {room} to the "
            f"response after a prompt of {context - room}; use {key}={room} or less"
        )
