"""Tiny models of transformers, peft, diffusers and PyG, with random weights and data, for the table of libraries.

A rank's batch has as many labels as any other's, so that the mean of the ranks' losses is that of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

#: Samples of one step, over all ranks, and steps.
SAMPLES, STEPS = 8, 3
VOCABULARY, LENGTH = 64, 12


def _loader(data: Any, size: int) -> Any:
    return DataLoader(data, batch_size=size)


def _loss_of(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


@dataclass(frozen=True)
class Library:
    """A model of a library.

    Attributes:
        name: of the row.
        package: that has the model.
        build: makes the model, after the seed is set.
        data: makes the samples of all steps.
        loss_of: ``loss_of(model, batch)``, as a script writes it.
        loader: makes a loader of the samples, with a batch size.
        lr: of SGD with momentum.
        others: strategies beside the usual ones, as names of `STRATEGIES`.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss_of: Callable[[nn.Module, Any], Tensor] = _loss_of
    loader: Callable[[Any, int], Any] = _loader
    lr: float = 0.5
    others: tuple[str, ...] = ()


def _tokens(*, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (SAMPLES * STEPS, LENGTH), generator=generator)


def _causal_data() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in _tokens()]


def _masked_data() -> list[dict[str, Tensor]]:
    # Three labels in each row.
    samples = []
    for row in _tokens():
        labels = torch.full_like(row, -100)
        labels[1::4] = row[1::4]
        samples.append({"input_ids": row, "labels": labels, "attention_mask": torch.ones_like(row)})
    return samples


def _translation_data() -> list[dict[str, Tensor]]:
    return [{"input_ids": a, "labels": b} for a, b in zip(_tokens(), _tokens(seed=4), strict=True)]


def _image_data() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(SAMPLES * STEPS, 3, 16, 16, generator=generator)
    # More of one class: the gradient of its bias is no rounding of nearly zero.
    return [{"pixel_values": image, "labels": max(number % 8 - 4, 0)} for number, image in enumerate(images)]


def _llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, use_cache=False, **{**sizes, **changes}, pad_token_id=0
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=1,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = BertForMaskedLM(config)
    return model


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        use_cache=False,
        decoder_start_token_id=0,
    )
    model: nn.Module = T5ForConditionalGeneration(config)
    return model


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = ViTForImageClassification(config)
    return model


def _mixtral(experts: str = "grouped_mm") -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        use_cache=False,
        pad_token_id=0,
    )
    config._experts_implementation = experts
    model: nn.Module = MixtralForCausalLM(config)
    return model


def routed(forward: Any, exchange: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Run the experts of a model of transformers: tokens, the numbers of their experts, and how much each counts."""
    order = chosen.flatten().argsort(stable=True)
    tokens = order // chosen.shape[1]
    rows = x[tokens].split(chosen.flatten().bincount(minlength=4).tolist())

    def run(rows: list[Tensor]) -> list[Tensor]:
        numbers = [torch.full((len(each), 1), number) for number, each in enumerate(rows)]
        ones = [each.new_ones(len(each), 1) for each in rows]
        return [forward(*given) for given in zip(rows, numbers, ones, strict=True)]

    found = torch.cat(exchange(rows, run)) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, tokens, found.to(x.dtype))


def _mixtral_with_plan() -> nn.Module:
    model: Any = _mixtral("eager")
    model.expert_plan = {"model.layers.*.mlp.experts": routed}
    return model  # type: ignore[no-any-return]


def _lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    # Without the usual start, at which half of the adapter has a gradient of zero.
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(_llama(), config)  # type: ignore[arg-type]
    return model


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    model: nn.Module = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model


def _noisy_data() -> list[tuple[Tensor, int, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    noisy, noise = torch.randn(2, SAMPLES * STEPS, 3, 8, 8, generator=generator)
    return [(a, 7 * number, b) for number, (a, b) in enumerate(zip(noisy, noise, strict=True))]


def _noise_loss(model: nn.Module, batch: Any) -> Tensor:
    noisy, time, noise = batch
    return nn.functional.mse_loss(model(noisy, time).sample, noise)


def _gnn() -> nn.Module:
    from torch_geometric.nn import GCNConv, GINConv, global_mean_pool

    class GNN(nn.Module):
        """Classifies graphs."""

        def __init__(self) -> None:
            super().__init__()
            self.first = GCNConv(6, 16)
            self.second = GINConv(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
            self.head = nn.Linear(16, 3)

        def forward(self, data: Any) -> Tensor:
            x = self.first(data.x, data.edge_index).relu()
            x = self.second(x, data.edge_index).relu()
            logits: Tensor = self.head(global_mean_pool(x, data.batch))
            return logits

    return GNN()


def _graphs() -> list[Any]:
    from torch_geometric.data import Data

    generator = torch.Generator().manual_seed(3)
    graphs = []
    for number in range(SAMPLES * STEPS):
        nodes = 4 + number % 5
        edges = torch.randint(nodes, (2, 3 * nodes), generator=generator)
        x = torch.randn(nodes, 6, generator=generator)
        graphs.append(Data(x=x, edge_index=edges, y=torch.tensor([number % 3])))
    return graphs


def _graph_loader(data: Any, size: int) -> Any:
    from torch_geometric.loader import DataLoader as GraphLoader

    return GraphLoader(data, batch_size=size)


def _graph_loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch), batch.y)


LIBRARIES = (
    Library("Llama", "transformers", _llama, _causal_data, others=("tensor_parallel", "context", "pipeline")),
    Library("GPT-2", "transformers", _gpt2, _causal_data, others=("tensor_parallel", "context", "pipeline")),
    Library("BERT", "transformers", _bert, _masked_data, others=("tensor_parallel", "context", "pipeline")),
    Library("T5", "transformers", _t5, _translation_data, others=("tensor_parallel", "context", "pipeline")),
    Library("ViT", "transformers", _vit, _image_data, others=("tensor_parallel", "context", "pipeline")),
    Library(
        "Mixtral",
        "transformers",
        _mixtral,
        _causal_data,
        others=("tensor_parallel", "context", "pipeline", "expert"),
    ),
    Library("Mixtral with a plan", "transformers", _mixtral_with_plan, _causal_data, others=("expert",)),
    Library("Llama with LoRA", "peft", _lora, _causal_data, others=("tensor_parallel", "context", "pipeline")),
    Library("UNet2DModel", "diffusers", _unet, _noisy_data, _noise_loss, lr=0.1, others=("pipeline",)),
    Library("GNN", "torch_geometric", _gnn, _graphs, _graph_loss, _graph_loader, lr=0.1, others=("pipeline",)),
)
