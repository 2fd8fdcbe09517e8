"""What `Lite` gives loggers: hyperparameters and artifacts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from plugframe import Lite, PlugframeWarning, SettingError, hookimpl
from plugframe.base import Logger
from plugframe.hooks import Artifact, HyperParameter
from plugframe.hooks.context import Context


class Notes(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.params: list[dict[str, Any]] = []
        self.artifacts: list[tuple[str, Any, int | None]] = []

    @hookimpl
    def logger_log_hyperparams(self, params: Mapping[str, HyperParameter]) -> None:
        self.params.append(dict(params))

    @hookimpl
    def logger_log_artifact(self, name: str, value: Artifact, step: int | None) -> None:
        self.artifacts.append((name, value, step))


class First(Logger):
    """A logger of the first contract: its tear-down takes no error, and the base class is not called."""

    ended = 0

    @hookimpl
    def logger_teardown(self) -> None:  # type: ignore[override]
        self.ended += 1


class Bare:
    """A logger of the first contract without the base class."""

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        pass

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        pass

    @hookimpl
    def logger_teardown(self) -> None:
        pass


def cpu(*loggers: Any, **settings: Any) -> Lite:
    return Lite(accelerator="cpu", devices=1, loggers=list(loggers), **settings)


@dataclasses.dataclass
class Settings:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)


# ---------------------------------------------------------------------- hyperparameters


def test_hyperparameters_are_flat_json() -> None:
    """Nested names are joined, numbers of torch and NumPy are numbers, and anything else is its str."""
    notes = Notes()
    with cpu(notes) as lite:
        lite.log_hyperparams(
            {
                "model": {"settings": Settings(), "empty": {}, 3: None},
                "arguments": argparse.Namespace(x=True, y=Path("a")),
                "tensor": torch.tensor(3),
                "array": np.float32(0.5),
                "dtype": torch.float16,
                "layers": [{"width": 8}, 16],
                "nan": float("nan"),
            }
        )
    (found,) = notes.params
    assert np.isnan(found.pop("nan"))
    assert found == {
        "model/settings/rate": 0.5,
        "model/settings/sizes": [1, 2],
        "model/empty": "{}",
        "model/3": None,
        "arguments/x": True,
        "arguments/y": "a",
        "tensor": 3,
        "array": 0.5,
        "dtype": "torch.float16",
        "layers/0/width": 8,
        "layers/1": 16,
    }
    assert [type(found[name]) for name in ("tensor", "array")] == [int, float]


def test_wrong_hyperparameters_are_refused() -> None:
    """What has no names, two values of one name, and a container that holds itself."""
    inside: dict[str, Any] = {}
    inside["inside"] = [inside]
    with cpu(Notes()) as lite:
        for wrong, message in (
            (3, "takes a mapping, a dataclass object or a namespace, got int"),
            ({"a/b": 1, "a": {"b": 2}}, "two values named 'a/b'"),
            (inside, "'inside' holds itself|'inside/0' holds itself"),
        ):
            with pytest.raises(SettingError, match=message):
                lite.log_hyperparams(wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- artifacts


def test_images_are_bytes_by_channel() -> None:
    """Tensors have their channels first, arrays and PIL images last; floats go from 0 to 1."""
    notes, red = Notes(), torch.zeros(3, 2, 4, dtype=torch.uint8)
    red[0] = 255
    with cpu(notes) as lite:
        lite.log_artifact("tensor", red)
        lite.log_artifact("float", red.double() / 255, step=3)
        lite.log_artifact("array", red.permute(1, 2, 0).numpy())
        lite.log_artifact("pil", Image.new("RGB", (4, 2), (255, 0, 0)))
        lite.log_artifact("gray", torch.ones(2, 4, dtype=torch.bool))
        red.zero_()
    *images, (_, gray, _) = notes.artifacts
    assert [(name, step) for name, _, step in images] == [
        ("tensor", None),
        ("float", 3),
        ("array", None),
        ("pil", None),
    ]
    for _, image, _ in images:
        assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 2, 4))
        assert (image[0] == 255).all()
        assert (image[1:] == 0).all()
    assert (tuple(gray.shape), gray.unique().tolist()) == ((1, 2, 4), [255])


def test_tables_have_the_columns_of_all_rows(tmp_path: Path) -> None:
    """Cells are plain values; a file is an absolute path, and a string is text."""
    (tmp_path / "weights.bin").write_bytes(b"1")
    notes = Notes()
    with cpu(notes) as lite:
        lite.log_artifact("table", [{"a": 1}, {"b": torch.tensor(0.5), "a": torch.int8}])
        lite.log_artifact("text", "two words")
        lite.log_artifact("folder/file", tmp_path / "weights.bin")
    assert [value for _, value, _ in notes.artifacts] == [
        [{"a": 1, "b": None}, {"a": "torch.int8", "b": 0.5}],
        "two words",
        tmp_path / "weights.bin",
    ]


def test_wrong_artifacts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the artifact, and says what was found and what is possible."""
    monkeypatch.chdir(tmp_path)
    Path("model.pt").touch()
    wrong: list[tuple[Any, str]] = [
        (3, "takes an image .* or a file .a Path., got int"),
        (b"x", "got bytes"),
        ("model.pt", "there is a file 'model.pt': write Path"),
        (Path("none.pt"), "there is no file 'none.pt'"),
        (tmp_path, "is a folder"),
        (torch.ones(2, 5, 5), "with 1, 3 or 4 channels C, got a 2x5x5 image"),
        (torch.ones(()), "got a number"),
        (torch.full((3, 2, 2), 200.0), "values from 0 to 1, got 200 to 200"),
        (torch.full((3, 2, 2), float("nan")), "values from 0 to 1, got nan to nan"),
        (torch.ones(2, 2, dtype=torch.int64), "uint8, bool or floating, got torch.int64"),
    ]
    notes = Notes()
    with cpu(notes) as lite:
        for value, message in wrong:
            with pytest.raises(SettingError, match=f"log_artifact.'culprit'.*{message}"):
                lite.log_artifact("culprit", value)
        for name in ("../up", "", "/root", "a//b", "nul\0", "."):
            with pytest.raises(SettingError, match="a name has letters, digits"):
                lite.log_artifact(name, "text")
        with pytest.raises(SettingError, match=r"log_artifact\(step=1.5\): a step is an integer, or None"):
            lite.log_artifact("name", "text", step=1.5)  # type: ignore[arg-type]
    assert notes.artifacts == []


def test_steps_are_integers() -> None:
    """A step may be a number of torch or NumPy; one that is no integer is refused."""
    seen: list[int | None] = []

    class Steps(Logger):
        @hookimpl
        def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
            seen.append(step)

    with cpu(Steps()) as lite:
        steps: list[Any] = [1, torch.tensor(2), np.int64(3), 4.0, None]
        for step in steps:
            lite.log("loss", 1.0, step=step)
        for wrong in (0.5, "first", torch.ones(2)):
            with pytest.raises(SettingError, match="a step is an integer, or None"):
                lite.log("loss", 1.0, step=wrong)  # type: ignore[arg-type]
    assert seen == [1, 2, 3, 4, None]
    assert [type(step) for step in seen[:4]] == [int] * 4


# ---------------------------------------------------------------------- what a logger does not store


def test_what_is_not_stored_is_warned_of_once() -> None:
    """Each logger that does not store a kind is named, whether it has plugframe's base class or not; others get it."""
    notes = Notes()
    with cpu(First(), Bare(), notes) as lite:
        with pytest.warns(PlugframeWarning) as warned:
            lite.log_hyperparams({"a": 1})
        with pytest.warns(PlugframeWarning) as warned_later:
            lite.log_artifact("words", "text")
        lite.log_hyperparams({"a": 1})
        lite.log_artifact("words", "text")
    texts = [str(each.message) for each in (*warned, *warned_later)]
    for name in ("First", "Bare"):
        for what in ("hyperparameters", "texts"):
            assert sum(f"{name} does not store {what}" in text for text in texts) == 1, texts
    assert len(texts) == 4
    assert (len(notes.params), len(notes.artifacts)) == (2, 2)


def test_without_a_logger_nothing_is_recorded() -> None:
    """A warning names the call and what to pass."""
    with cpu() as lite:
        with pytest.warns(PlugframeWarning, match=r"log_hyperparams\(\) has no effect. There is no logger"):
            lite.log_hyperparams({"a": 1})
        with pytest.warns(PlugframeWarning, match=r"log_artifact\(\) has no effect. There is no logger"):
            lite.log_artifact("a", "text")
