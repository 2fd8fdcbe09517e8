"""Models of Hugging Face's libraries, and files in their layout."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plugframe import CheckpointError, Lite, OrderError, SettingError, SettingTypeError, World
from plugframe.utils.environment import preserved_environment
from plugframe_builtins._shared.generation import _MARK, keep_in_step
from plugframe_builtins.fsdp.strategy import FSDP
from ranks import run_ranks


class Tied(nn.Module):
    """A model with tied weights that saves itself by its `state_dict`, as Hugging Face's do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.block = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens)))


class Pretrained(Tied):
    """One with a method of its own to save it."""

    def save_pretrained(self, folder: str, max_shard_size: int = 1000) -> int:
        os.makedirs(folder, exist_ok=True)
        save_file({name: t.clone() for name, t in self.state_dict().items()}, Path(folder) / "own.safetensors")
        return max_shard_size


def test_a_model_is_written_in_hugging_faces_layout(tmp_path: Path) -> None:
    """One file, or several with an index; tied weights once; files of an earlier save do not stay."""
    with Lite(accelerator="cpu", devices=1) as lite:
        model = Tied()
        with pytest.raises(OrderError, match="this Tied was not"):
            lite.save_model(model, tmp_path)
        lite.setup(model)
        lite.save_model(model, tmp_path, max_shard_size=100)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * (24 + 16 + 4)
        assert sorted(index["weight_map"]) == ["block.bias", "block.weight", "embed.weight"]
        assert index["weight_map"]["embed.weight"] == "model-00001-of-00002.safetensors"
        lite.save_model(model, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        assert torch.equal(load_file(tmp_path / "model.safetensors")["embed.weight"], model.embed.weight)
        for size in ("5 TB", 0, True, "big"):
            with pytest.raises(SettingError, match="number of bytes, or a size such as '5GB'"):
                lite.save_model(model, tmp_path, max_shard_size=size)
        with pytest.raises(SettingTypeError, match="takes a module first"):
            lite.save_model(tmp_path, model)
        with pytest.raises(SettingError, match="is a file"):
            lite.save_model(model, tmp_path / "model.safetensors")


def test_a_model_writes_its_own_folder(tmp_path: Path) -> None:
    """A model with `save_pretrained` writes the folder itself."""
    with Lite(accelerator="cpu", devices=1) as lite:
        model = lite.setup(Pretrained())
        lite.save_model(model, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]


def saved_on_ranks(world: World, folder: Path) -> None:
    """Save a sharded model by its own method, and by `save_model`; fail on rank 0 for all."""
    torch.manual_seed(0)
    expected = Tied().state_dict()
    with Lite(accelerator="cpu", devices=2, strategy="fsdp") as lite:
        lite.launch()
        torch.manual_seed(0)
        model = Pretrained()
        model = lite.setup(model)
        model.save_pretrained(str(folder / "own"))
        lite.save_model(model, folder / "again")
        for name in ("own", "again"):
            found = load_file(folder / name / "own.safetensors")
            assert all(torch.equal(found[key], value) for key, value in expected.items())
        (folder / f"file{world.global_rank}").touch()
        with pytest.raises(CheckpointError if world.global_rank else FileExistsError, match="file0"):
            model.save_pretrained(str(folder / "file0"))


def test_a_sharded_model_is_saved_in_full(tmp_path: Path) -> None:
    """Under a strategy that shards, `save_pretrained` writes full tensors; an error on rank 0 is one on all."""
    run_ranks(2, saved_on_ranks, tmp_path)


class Rotary(nn.Module):
    """One of transformers, by its package."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.rand(4), persistent=False)
        self.register_buffer("scale", torch.rand(4), persistent=False)


def test_rotary_frequencies_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded frequencies would turn late positions by whole turns; from_pretrained(dtype=) keeps them too."""
    monkeypatch.setattr(Rotary, "__module__", "transformers.models.some")
    model = nn.Sequential(nn.Linear(4, 4), Rotary())
    before = {name: buffer.clone() for name, buffer in model[1].named_buffers()}
    with Lite(accelerator="cpu", devices=1, precision="bf16-true") as lite:
        lite.setup(model)
        assert torch.equal(model[1].inv_freq, before["inv_freq"])  # type: ignore[arg-type]
        assert torch.equal(model[1].scale, before["scale"].bfloat16())  # type: ignore[arg-type]
        assert model[0].weight.dtype is torch.bfloat16


class Adapted(nn.Module):
    """One of peft, by its package: its `generate` calls that of the model in it, which the source does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Generating()

    def generate(self, x: Tensor) -> Tensor:
        run = getattr(self, "base_model").generate  # noqa: B009
        result: Tensor = run(x)
        return result


class Generating(nn.Linear):
    """Calls itself, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def generate(self, x: Tensor) -> Tensor:
        out: Tensor = self(x)
        return out


def test_generate_of_peft_runs_under_the_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` of a model of peft needs no `forward_methods`."""
    monkeypatch.setattr(Adapted, "__module__", "peft.some")
    with Lite(accelerator="cpu", devices=1, precision="bf16-true") as lite:
        model = lite.setup(nn.Sequential(Adapted())[0])
        assert model.generate(torch.ones(2, 4)).dtype is torch.float32


def test_models_that_generate_keep_ranks_in_step() -> None:
    """Every model in a module that generates is marked for transformers, and no longer after the end."""
    model = Adapted()
    with ExitStack() as undo:
        keep_in_step(model, undo)
        assert getattr(model, _MARK)
        assert getattr(model.base_model, _MARK)
    assert not hasattr(model, _MARK)
    assert not hasattr(model.base_model, _MARK)


def test_transformers_works_on_one_rank(tmp_path: Path) -> None:
    """`from_pretrained` under `init_module(empty_init=True)`, training, `save_pretrained` and `generate`."""
    pytest.importorskip("transformers")
    # Its import of accelerate sets a variable.
    with preserved_environment(), Lite(accelerator="cpu", devices=1) as lite:
        use_transformers(lite, tmp_path)


def transformers_on_ranks(world: World, folder: Path) -> None:
    strategy = FSDP(activation_checkpointing=True)
    with Lite(accelerator="cpu", devices=2, strategy=strategy) as lite:
        lite.launch()
        use_transformers(lite, folder)


def test_transformers_works_under_fsdp(tmp_path: Path) -> None:
    """The same where ranks hold shards, with ranks that generate texts of different lengths."""
    pytest.importorskip("transformers")
    run_ranks(2, transformers_on_ranks, tmp_path)


def use_transformers(lite: Lite, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    reference: Any = LlamaForCausalLM(config)
    if lite.is_global_zero:
        reference.save_pretrained(folder / "first", max_shard_size="50KB")
    lite.barrier()
    with lite.init_module(empty_init=True):
        model: Any = LlamaForCausalLM.from_pretrained(folder / "first")
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert_same(lite.state_dict(model, all_ranks=True), reference.state_dict())
    tokens = torch.arange(2, 18).view(2, 8)
    loss = model(input_ids=tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(reference(input_ids=tokens, labels=tokens).loss.item(), rel=1e-4)
    lite.backward(loss)
    optimizer.step()
    lite.save_model(model, folder / "second", max_shard_size="50KB")
    assert (folder / "second" / "model.safetensors.index.json").is_file()
    assert_same(LlamaForCausalLM.from_pretrained(folder / "second").state_dict(), reference.state_dict())
    model.eval()
    number = 3 + 2 * lite.global_rank
    with torch.no_grad():
        text = model.generate(tokens[:1, :number], max_new_tokens=number, do_sample=False)
        expected = reference.eval().generate(tokens[:1, :number], max_new_tokens=number, do_sample=False)
    assert torch.equal(text, expected)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
