"""Policies and tokenizers from folders; what is wrong with a folder is said in one sentence before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pieces import tiny_policy, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from vespo_lightning.errors import UserError
from vespo_lightning.models.export import export_hf
from vespo_lightning.models.loading import (
    context_length,
    is_moe_config,
    load_model,
    load_tokenizer,
    resolve_model_path,
)
from vespo_lightning.models.tiny_moe import byte_tokenizer, tiny_qwen3_moe
from vespo_lightning.tasks.addition import AdditionTask


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_hf(tiny_policy(), tokenizer(), tmp_path_factory.mktemp("model") / "export")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    said = str(error.value)
    assert "\n" not in said and said.startswith("model.path=")
    return said


def remove(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
    return folder


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        (["config.json"], "has no config.json; give a folder written by save_pretrained()"),
        (["*.safetensors"], "has no weights (model.safetensors); save the model there first"),
        (["tokenizer*", "vocab*"], "has no tokenizer (tokenizer.json); save it there with tokenizer.save_pretrained()"),
        (["*"], "has no config.json"),
    ],
)
def test_incomplete_folders(folder, patterns, sentence):
    remove(folder, *patterns)
    for load in (resolve_model_path, load_model, load_tokenizer):
        with pytest.raises(UserError) as error:
            load(str(folder))
        assert sentence in one_sentence(error) and str(folder) in str(error.value)


def test_paths_that_are_not_there(tmp_path):
    for path in (str(tmp_path / "missing"), "./missing", "~/missing-model-folder", "a/b/c"):
        with pytest.raises(UserError, match="no such folder") as error:
            resolve_model_path(path)
        one_sentence(error)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"has no config\.json") as error:
        resolve_model_path(str(tmp_path / "model.safetensors"))
    one_sentence(error)


def test_unknown_built_in_models():
    with pytest.raises(UserError, match=r"model\.path=builtin:nonsense is unknown; built-in models: ") as error:
        resolve_model_path("builtin:nonsense")
    one_sentence(error)


@pytest.mark.parametrize("path", ["", "builtin:", "builtin:../assets"])
def test_empty_names(path):
    with pytest.raises(UserError) as error:
        resolve_model_path(path)
    one_sentence(error)


def test_hub_ids_pass_and_fail_in_one_sentence_when_they_do_not_load():
    """Without network: the error of the hub becomes a sentence with the name in it."""
    name = "no-such-owner/no-such-model"
    assert resolve_model_path(name) == name
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=name) as error:
            load(name)
        one_sentence(error)


def test_damaged_files(folder):
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="the model does not load") as error:
        load_model(str(folder))
    one_sentence(error)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="does not load") as error:
        load_model(str(folder))
    one_sentence(error)


def test_weights_that_do_not_cover_the_model(folder):
    """transformers fills missing weights with random numbers and a warning; a run must not start from those."""
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks \d+ weights.*model\.layers\.2") as error:
        load_model(str(folder))
    one_sentence(error)


def test_a_tokenizer_without_an_end_token(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no end-of-sequence token") as error:
        load_tokenizer(str(folder))
    one_sentence(error)


def test_a_missing_pad_token_becomes_the_end_token(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(folder)).pad_token_id == tokenizer().eos_token_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_and_load_give_the_same_model(exported, dtype):
    model, wanted = load_model(str(exported), dtype), tiny_policy()
    assert model.dtype == getattr(torch, dtype)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(model.dtype)), name
    assert load_tokenizer(str(exported)).get_vocab() == tokenizer().get_vocab()
    assert model.generation_config.eos_token_id == tokenizer().eos_token_id


@pytest.mark.parametrize("experts", ["grouped_mm", "eager", "loop"])
def test_experts_compute_as_asked(exported, experts):
    model = load_model(str(exported), experts=experts)
    assert model.config._experts_implementation == experts
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny_policy()(ids).logits, rtol=1e-4, atol=1e-4)


def test_loop_is_the_backend_for_float64(exported):
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = [load_model(str(exported), "float64", experts)(ids).logits for experts in ("loop", "eager")]
    assert logits[0].dtype == torch.float64
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match=r"^model\.experts=grouped_mm does not compute in float64; use .*=loop$"):
        load_model(str(exported), "float64")


def test_unknown_experts(exported):
    with pytest.raises(UserError, match=r"^model\.experts=nonsense is unknown; use grouped_mm, eager, loop or megabl"):
        load_model(str(exported), experts="nonsense")


@pytest.mark.parametrize("router_dtype", [None, "float32"])
@pytest.mark.parametrize("freeze", [False, True])
def test_options_of_routers(exported, freeze, router_dtype):
    model = load_model(str(exported), "bfloat16", freeze_router=freeze, router_dtype=router_dtype)
    for layer in model.model.layers:
        gate = layer.mlp.gate.weight
        assert gate.requires_grad is not freeze
        assert gate.dtype == (torch.float32 if router_dtype else torch.bfloat16)
        assert layer.mlp.experts.down_proj.requires_grad and layer.mlp.experts.down_proj.dtype == torch.bfloat16


def test_unknown_router_dtypes(exported):
    with pytest.raises(UserError, match=r"^model\.router_dtype=float16 is not supported; use null or float32$"):
        load_model(str(exported), router_dtype="float16")


def test_gradient_checkpointing_is_switched_on(exported):
    model = load_model(str(exported), gradient_checkpointing=True)
    assert model.is_gradient_checkpointing
    assert not load_model(str(exported)).is_gradient_checkpointing


def test_dense_models_load_too(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=99,
    )  # fmt: skip
    folder = export_hf(LlamaForCausalLM(config), tokenizer(), tmp_path / "dense")
    assert not is_moe_config(str(folder))
    assert context_length(load_model(str(folder))) == 99
    for options in ({"freeze_router": True}, {"router_dtype": "float32"}):
        with pytest.raises(UserError, match=r"^model\.(freeze_router=true|router_dtype=float32): .* is a dense model"):
            load_model(str(folder), **options)


def test_moe_configurations_are_recognised(exported):
    assert is_moe_config(str(exported))


def test_a_second_export_replaces_the_first_whole(tmp_path):
    folder = tmp_path / "export"
    export_hf(tiny_policy(seed=1), tokenizer(), folder)
    (folder / "leftover").touch()
    (tmp_path / "export.partial").mkdir()
    (tmp_path / "export.partial" / "junk").touch()
    export_hf(tiny_policy(seed=2), tokenizer(), folder)
    assert not (folder / "leftover").exists() and not (folder / "junk").exists()
    assert not (tmp_path / "export.partial").exists()
    loaded, wanted = load_model(str(folder)).state_dict(), tiny_policy(seed=2).state_dict()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_the_byte_tokenizer_keeps_every_text():
    tok = byte_tokenizer()
    problem = AdditionTask(distractors=2).held_out()[0]
    text = f"{problem.prompt}{AdditionTask().solution(AdditionTask().held_out()[0])}"
    ids = tok.encode(text, add_special_tokens=False)
    assert len(ids) == len(text) and tok.pad_token_id not in ids
    assert tok.decode([*ids, tok.eos_token_id], skip_special_tokens=True) == text
    assert (tok.pad_token_id, tok.eos_token_id) == (0, 1)


def test_the_tiny_model_is_tiny_and_seeded():
    tok = tokenizer()
    torch.manual_seed(5)
    model = tiny_qwen3_moe(tok, seed=3)
    drawn = torch.rand(1)
    again = tiny_qwen3_moe(tok, seed=3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)  # making it does not touch the global random state
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = tiny_qwen3_moe(tok, seed=4)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
