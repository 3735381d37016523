import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.addition import AdditionTask
from vespo_lightning.tasks.prompts import PromptStream, render_prompt

TEMPLATE = (
    "{% for message in messages %}<{{ message.role[0] }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def make_tokenizer(special: str | None = None, **settings) -> PreTrainedTokenizerFast:
    """One token per character; ``special`` is what the tokenizer puts around a text, ``$A``."""
    letters = dict.fromkeys("0123456789+=;#\nabcdefghijklmnopqrstuvwxyz<>? ")
    vocabulary = {token: number for number, token in enumerate(["[S]", "[E]", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[E]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=special, special_tokens=[("[S]", 0), ("[E]", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[S]", eos_token="[E]", **settings)


def test_any_number_of_ranks_takes_the_same_problems():
    task = AdditionTask()
    alone = PromptStream(task, seed=7)
    expected = alone.take(24)
    assert expected == [(index, task.train_problem(7, index)) for index in range(24)]
    for world_size in (1, 2, 3, 4):
        streams = [PromptStream(task, 7, rank, world_size) for rank in range(world_size)]
        for start in (0, 12):
            taken = [stream.take(12 // world_size) for stream in streams]
            # dealt like cards: reading across the ranks gives the order of one rank
            assert [problem for hand in zip(*taken, strict=True) for problem in hand] == expected[start : start + 12]


def test_state_goes_on_with_another_number_of_ranks():
    task = AdditionTask()
    streams = [PromptStream(task, 0, rank, 4) for rank in range(4)]
    states = [(stream.take(3), stream.state_dict())[1] for stream in streams]
    assert states == [{"cursor": 12}] * 4
    resumed = PromptStream(task, 0)
    resumed.load_state_dict(states[2])
    assert resumed.take(2) == [(12, task.train_problem(0, 12)), (13, task.train_problem(0, 13))]
    assert resumed.take(0) == []
    with pytest.raises(ValueError, match="rank 2"):
        PromptStream(task, 0, rank=2, world_size=2)


def test_plain_prompts_get_no_end_token():
    text = AdditionTask().train_problem(0, 0).prompt
    plain = make_tokenizer()
    ids = render_prompt(plain, text)
    assert plain.decode(ids).replace(" ", "") == text and len(ids) == len(text)
    assert render_prompt(make_tokenizer("[S] $A"), text) == [0, *ids]
    assert render_prompt(make_tokenizer("[S] $A [E]"), text) == [0, *ids]
    assert render_prompt(make_tokenizer("$A [E]"), text) == ids


def test_messages_without_a_template_are_joined():
    tokenizer = make_tokenizer()
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    assert render_prompt(tokenizer, messages) == render_prompt(tokenizer, "be brief\n\n1+1?")


def test_chat_template_is_used_and_opens_the_answer():
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    bare = make_tokenizer()
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    assert render_prompt(tokenizer, "1+1?") == render_prompt(bare, "<u>1+1?<a>")
    assert render_prompt(tokenizer, messages) == render_prompt(bare, "<s>be brief<u>1+1?<a>")


def test_a_template_that_refuses_is_named():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(UserError, match=r"roles system, user \(no system role\).*task.system_prompt=null"):
        render_prompt(
            make_tokenizer(chat_template=refusing),
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}],
        )
