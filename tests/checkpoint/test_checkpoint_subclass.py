"""Tensors of subclasses: saved by their parts, loaded into live tensors of the same class only."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from plugframe import CheckpointError, CheckpointMismatchError, Lite
from plugframe.checkpoint import FlattenedTensor
from plugframe.tools.checkpoint import command
from plugframe_builtins.dcp_checkpoint.checkpoint import ShardedCheckpoint


class Mode(enum.Enum):
    """A setting of a tensor."""

    FAST = 1
    EXACT = 2


@dataclass(frozen=True)
class Settings:
    """Settings of a tensor that are no plain values."""

    mode: Mode = Mode.FAST
    dtype: torch.dtype = torch.int8


class Scaled(Tensor):
    """int8 numbers with a scale per row."""

    data_: Tensor
    scale: Tensor
    settings: Any

    @staticmethod
    def __new__(cls, data_: Tensor, scale: Tensor, settings: Any = None) -> Any:
        return Tensor._make_wrapper_subclass(cls, data_.shape, dtype=scale.dtype, device=data_.device)  # type: ignore[attr-defined]

    def __init__(self, data_: Tensor, scale: Tensor, settings: Any = None) -> None:
        self.data_, self.scale = data_, scale
        self.settings = Settings() if settings is None else settings

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data_", "scale"], [self.settings, self.data_.device]

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Any:
        return cls(inner["data_"], inner["scale"], context[0])

    def plain(self) -> Tensor:
        """Return the numbers as a plain tensor."""
        return self.data_.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            it = args[0]
            return cls(func(it.data_), func(it.scale), it.settings)
        plain = tree_map(lambda each: each.plain() if isinstance(each, Scaled) else each, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class Other(Scaled):
    """Another class of the same parts."""


class Pair(Scaled):
    """A tensor whose numbers are of a subclass themselves."""


def scaled(seed: int, cls: Any = Scaled, settings: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    return cls(torch.randint(-9, 9, (4, 3), dtype=torch.int8), torch.rand(4, 1, dtype=dtype), settings)


class Net(nn.Module):
    """A linear layer with weights of a subclass, twice under one name, and a plain bias."""

    def __init__(self, seed: int, cls: Any = Scaled, settings: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(scaled(seed, cls, settings), requires_grad=False)
        self.bias = nn.Parameter(torch.full((4,), float(seed)))
        self.register_buffer("table", scaled(seed + 100, cls, settings))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def numbers(tensor: Any) -> Tensor:
    return torch.cat([tensor.data_.flatten().float(), tensor.scale.flatten()])


CHECKPOINTS = ["safetensors", "dcp"]


@pytest.fixture(params=CHECKPOINTS)
def lite(request: pytest.FixtureRequest) -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=1, checkpoint=request.param) as lite:
        yield lite


def test_parameters_and_buffers_of_a_subclass_come_back(lite: Lite, tmp_path: Path) -> None:
    """The live tensors keep their identity and class, and get the saved parts; a plain tensor beside them too."""
    saved, model, lone = Net(1), Net(2), scaled(5)
    lite.save(tmp_path / "x", {"model": saved, "lone": scaled(3), "nest": {"model": saved, "b": 1}})
    before = model.weight
    lite.load(tmp_path / "x", {"model": model, "lone": lone, "nest": {"model": model, "b": 0}})
    assert model.weight is before
    assert type(model.weight) is Scaled
    assert torch.equal(numbers(model.weight), numbers(saved.weight))
    assert torch.equal(numbers(model.table), numbers(saved.table))
    assert torch.equal(numbers(lone), numbers(scaled(3)))
    assert model.bias[0] == 1


def test_without_a_live_tensor_the_parts_are_returned(lite: Lite, tmp_path: Path) -> None:
    """A state without objects has what the class consisted of, and can be saved again."""
    lite.save(tmp_path / "x", {"model": Net(1)})
    found = lite.load(tmp_path / "x")["model"]["weight"]
    assert isinstance(found, FlattenedTensor)
    assert found.class_name.endswith("test_checkpoint_subclass.Scaled")
    assert torch.equal(numbers(found.like(scaled(7))), numbers(scaled(1)))
    lite.save(tmp_path / "y", {"model": {"weight": found, "none": nn.Identity()}})
    again = scaled(7)
    lite.load(tmp_path / "y", {"model": {"weight": again, "none": nn.Identity()}})
    assert torch.equal(numbers(again), numbers(scaled(1)))


def test_the_command_lists_them(lite: Lite, tmp_path: Path) -> None:
    """plugframe checkpoint inspect shows shape, dtype and size; convert keeps them."""
    lite.save(tmp_path / "x", {"model": Net(1)})
    target = tmp_path / "y"
    for words in (["inspect", str(tmp_path / "x")], ["convert", str(tmp_path / "x"), str(target)]):
        done = CliRunner().invoke(command, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        if words[0] == "inspect":
            assert re.search(r"model\.weight +float32 +4×3 +28\b", done.output), done.output
    live = Net(2)
    lite.load(target, {"model": live})
    assert torch.equal(numbers(live.weight), numbers(Net(1).weight))


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            Net(2, Other),
            r"model.weight is .*\.Other, the checkpoint has .*\.Scaled: it loads into a tensor of that class",
        ),
        (
            Net(2, settings=Settings(Mode.EXACT)),
            r"model.weight is a .*\.Scaled with other settings than the checkpoint's",
        ),
        (
            nn.Linear(3, 4),
            r"model.weight is a Tensor, the checkpoint has .*\.Scaled: it loads into a tensor of that class",
        ),
    ],
)
def test_another_class_is_refused(lite: Lite, tmp_path: Path, model: nn.Module, problem: str) -> None:
    """One line names both classes, and nothing is written."""
    lite.save(tmp_path / "x", {"model": Net(1)})
    before = model.get_parameter("bias").clone()
    with pytest.raises(CheckpointMismatchError, match=problem):
        lite.load(tmp_path / "x", {"model": model}, strict=False)
    assert torch.equal(model.get_parameter("bias"), before)


def test_plain_values_do_not_load_into_a_subclass(lite: Lite, tmp_path: Path) -> None:
    """Weights that were saved before a conversion load before it."""
    lite.save(tmp_path / "x", {"model": nn.Linear(3, 4)})
    with pytest.raises(CheckpointMismatchError, match="the checkpoint has a plain tensor: load it before the model is"):
        lite.load(tmp_path / "x", {"model": Net(1)}, strict=False)


def test_parts_of_another_shape_or_dtype_are_refused(lite: Lite, tmp_path: Path) -> None:
    """The tensor and each of its parts must be of the saved shape and dtype."""
    lite.save(tmp_path / "x", {"w": scaled(1), "other": nn.Identity()})
    live = Scaled(torch.zeros(4, 3, dtype=torch.int8), torch.ones(1, 1))
    with pytest.raises(
        CheckpointMismatchError, match=r"w does not fit: its scale is torch.float32 of shape \(1, 1\), the"
    ):
        lite.load(tmp_path / "x", {"w": live, "other": nn.Identity()})
    with pytest.raises(
        CheckpointMismatchError, match=r"w has shape \(4, 3\) of torch.float16, the checkpoint has shape"
    ):
        lite.load(tmp_path / "x", {"w": scaled(1, dtype=torch.float16), "other": nn.Identity()})


class Keeping(torch.optim.SGD):
    """An optimizer with a state of a subclass."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                self.state[parameter]["average"] = scaled(number)


def stepped() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 4)
    optimizer = Keeping(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_the_state_of_an_optimizer_needs_one_of_its_class(lite: Lite, tmp_path: Path) -> None:
    """It loads where the optimizer has such a state, and is refused by name where it has none."""
    _, optimizer = lite.setup(*stepped())
    lite.save(tmp_path / "x", {"optimizer": optimizer})
    _, other = lite.setup(*stepped())
    for parameter in other.state:
        other.state[parameter]["average"] = scaled(50)
    lite.load(tmp_path / "x", {"optimizer": other}, strict=False)
    first = next(iter(other.state.values()))["average"]
    assert torch.equal(numbers(first), numbers(scaled(0)))
    fresh = lite.setup_optimizers(Keeping(nn.Linear(3, 4).parameters(), lr=0.1))
    with pytest.raises(
        CheckpointMismatchError, match="average of parameter 0 is a .*Scaled, which the optimizer has none"
    ):
        lite.load(tmp_path / "x", {"optimizer": fresh}, strict=False)


def test_settings_without_text_are_refused(lite: Lite, tmp_path: Path) -> None:
    """A class whose settings could not be compared on load cannot be saved."""
    with pytest.raises(
        CheckpointError, match="state.'w'. is a .*Scaled, whose settings cannot be saved: they hold object"
    ):
        lite.save(tmp_path / "x", {"w": scaled(1, settings=object())})


def test_torchs_layout_refuses_subclasses(tmp_path: Path) -> None:
    """torch's own checkpoints would import the class by its name."""
    with (
        Lite(accelerator="cpu", devices=1, checkpoint=ShardedCheckpoint(layout="torch")) as lite,
        pytest.raises(
            CheckpointError, match=r"'model.weight' is a .*Scaled, a subclass of Tensor, which layout='torch'"
        ),
    ):
        lite.save(tmp_path / "x", {"model": Net(1)})
