"""The frozen policy that a KL penalty refers to, and log-probs of samples without gradients."""

from __future__ import annotations

import copy

import lightning as L
import numpy as np
import pytest
import torch
from pieces import make_samples, own_log_probs, tiny_policy, tokenizer

from vespo_lightning.errors import UserError
from vespo_lightning.training.policy import Policy
from vespo_lightning.training.reference import ReferencePolicy, check_same_tokenizer, sample_log_probs

BUDGET = {"token_budget": 40, "layout": "padded"}


@pytest.mark.parametrize(("budget", "layout"), [(10_000, "padded"), (18, "padded"), (25, "packed")])
def test_log_probs_of_samples(budget, layout):
    """In the order of the samples, however they are cut, at the temperature asked for."""
    model = tiny_policy().double()
    model.set_experts_implementation("eager")
    samples = make_samples(model)
    got = sample_log_probs(Policy(model), samples, token_budget=budget, layout=layout, temperature=0.7)
    for sample, log_probs in zip(samples, got, strict=True):
        wanted = own_log_probs(model, sample.prompt_ids.tolist(), sample.response_ids.tolist(), 0.7)
        assert log_probs.dtype == np.float32 and log_probs.shape == wanted.shape
        assert abs(log_probs - wanted).max() < 1e-6
    assert sample_log_probs(Policy(model), [], token_budget=budget, layout=layout, temperature=0.7) == []


def test_a_reference_is_not_the_policy_in_training():
    """Steps of the policy leave it alone, and it takes no part in them."""
    model = tiny_policy()
    reference = ReferencePolicy(copy.deepcopy(model), "folder")
    samples = make_samples(model)
    before = reference.log_probs(samples, **BUDGET, temperature=1.0)
    for sample, log_probs in zip(samples, before, strict=True):
        own = own_log_probs(model, sample.prompt_ids.tolist(), sample.response_ids.tolist())
        assert abs(log_probs - own).max() < 1e-5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = reference.log_probs(samples, **BUDGET, temperature=1.0)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(parameter.requires_grad for parameter in reference.policy.parameters())
    assert not any(module.training for module in reference.policy.model.modules())


def test_a_reference_is_no_part_of_checkpoints():
    module = L.LightningModule()
    module.reference = ReferencePolicy(tiny_policy(), "folder")
    assert module.state_dict() == {} and list(module.parameters()) == []


def test_the_checksum_names_the_weights():
    """The same for another copy and another precision of the run, another for one other number."""
    reference = ReferencePolicy(tiny_policy(), "folder")
    assert reference.checksum == ReferencePolicy(tiny_policy(), "elsewhere").checksum
    model = tiny_policy()
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 5] += 1e-3
    assert ReferencePolicy(model, "folder").checksum != reference.checksum
    before = reference.checksum
    reference.to(torch.device("cpu"), torch.float64)
    assert reference.checksum == before


def test_it_takes_the_precision_of_the_policy():
    """Buffers keep theirs: rotary frequencies in bfloat16 would point elsewhere."""
    model = tiny_policy()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    reference = ReferencePolicy(model, "folder")
    reference.to(torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in reference.policy.parameters()} == {torch.bfloat16}
    assert buffers
    for name, buffer in reference.policy.model.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name])


def test_another_tokenizer_is_refused():
    check_same_tokenizer(tokenizer(), tokenizer(), "folder")
    other = tokenizer()
    other.add_tokens(["<more>"])
    for reference, policy in ((other, tokenizer()), (tokenizer(), other)):
        with pytest.raises(UserError, match=r"^kl\.reference=folder has another tokenizer .*\(1 tokens differ\); give"):
            check_same_tokenizer(reference, policy, "folder")
