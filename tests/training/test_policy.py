"""The policy in front of a Hugging Face model: log-probs of chosen positions, plain heads only, recomputation."""

from __future__ import annotations

import pytest
import torch
from pieces import fit, make_mini_batch, make_samples, own_log_probs, tiny_policy
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.training.micro_batches import collate
from vespo_lightning.training.module import PolicyModule
from vespo_lightning.training.policy import Policy


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_log_probs_of_ragged_samples(layout):
    model = tiny_policy().double()
    model.set_experts_implementation("eager")
    samples = make_samples(model)
    out = Policy(model, chunk=4)(collate(samples, layout), temperature=0.7)
    start = 0
    for sample in samples:
        wanted = own_log_probs(model, sample.prompt_ids.tolist(), sample.response_ids.tolist(), 0.7)
        got = out.log_prob[start : start + len(wanted)].detach().numpy()
        assert abs(got - wanted).max() < 1e-12
        start += len(wanted)
    assert start == len(out.log_prob) == len(out.entropy)


def test_heads_with_a_bias():
    """Some families have one (Phi); it is part of the logits."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head = torch.nn.Linear(16, 32)
    sample = make_samples(model)[:1]
    out = Policy(model)(collate(sample))
    wanted = own_log_probs(model, sample[0].prompt_ids.tolist(), sample[0].response_ids.tolist())
    torch.testing.assert_close(out.log_prob.detach(), torch.from_numpy(wanted))


def test_heads_that_transform_their_logits_are_refused():
    config = CohereConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logit_scale=0.25,
    )  # fmt: skip
    model = CohereForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    with pytest.raises(UserError, match=r"^model\.path: CohereForCausalLM transforms its logits"):
        Policy(model)


def test_dropout_is_off():
    """Otherwise equal weights would not give an importance ratio of 1."""
    model = tiny_policy()
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    samples = make_samples(tiny_policy(), noise=0.0)
    module = PolicyModule(model, Vespo(), lr=0.0)
    fit(module, [make_mini_batch(samples)])
    assert module.last_update.tokens.log_ratio.abs().max() < 1e-5


def test_gradient_checkpointing_recomputes_and_changes_no_gradient():
    """Recomputation starts in every layer, and stops as soon as it has what the backward pass needs."""
    model = tiny_policy()
    batch = make_mini_batch(make_samples(model))
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        module = PolicyModule(model, Vespo(), lr=0.0, max_grad_norm=None)
        calls.clear()
        fit(module, [batch])
        return len(calls), {name: p.grad.clone() for name, p in model.named_parameters()}

    once, plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    twice, recomputed = gradients()
    assert twice == once + 1
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
