"""A stream of training problems whose whole state is a number, and prompts as token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.base import Problem, PromptText, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptStream:
    """Training problems in order, dealt to the ranks like cards.

    Of every ``world_size`` problems in a row each rank takes one. So the first k problems of all ranks are
    together the first ``k * world_size`` of the run, and the stream goes on unchanged with another number of
    ranks.

    Args:
        task: the source of problems.
        seed: the run's seed, the same on every rank.
        rank: which of the problems are this rank's.
        world_size: number of ranks; all must take the same number of problems.
    """

    def __init__(self, task: Task, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0 .. {world_size - 1}")
        self.task = task
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.cursor = 0
        """Problems that all ranks have taken together."""

    def take(self, n: int) -> list[tuple[int, Problem]]:
        """This rank's next ``n`` problems, each with its place in the stream of all ranks."""
        start = self.cursor + self.rank
        self.cursor += n * self.world_size
        places = range(start, self.cursor, self.world_size)
        return [(place, self.task.train_problem(self.seed, place)) for place in places]

    def state_dict(self) -> dict[str, int]:
        """The position, valid for any rank and number of ranks."""
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.cursor = state["cursor"]


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: PromptText) -> list[int]:
    """Token ids of a prompt, ready for the policy to go on.

    Where the tokenizer has a chat template, the prompt (a string counts as one message of the user) goes
    through it, the header of the assistant's turn included. Where it has none, the text is encoded with the
    special tokens that the tokenizer puts in front, and none behind; messages are joined by blank lines.

    Raises:
        UserError: the template refuses the messages (some know no system role).
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        except Exception as error:  # templates are programs of the model's makers and raise what they like
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template of the model refuses messages of roles {roles} ({error}); "
                "if it knows no system role, set task.system_prompt=null"
            ) from error
    text = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
    token_ids = list(tokenizer.encode(text))
    bare = tokenizer.encode(text, add_special_tokens=False)
    # an end token here would tell the policy that the text is over before it has answered
    while token_ids and token_ids[-1] == tokenizer.eos_token_id and token_ids[-len(bare) :] != bare:
        token_ids.pop()
    return token_ids
