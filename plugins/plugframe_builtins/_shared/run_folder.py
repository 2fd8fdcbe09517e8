"""A folder for every run, with its id, its status, its hyperparameters and its artifacts."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from plugframe.checkpoint import FolderLock
from plugframe.hooks import Artifact, HyperParameter, artifact_kind
from plugframe_builtins._shared.png import encode_png
from plugframe_builtins._shared.version_folder import new_version

#: The file with the run's id, its status ("running", "finished" or "failed"), its error, and its jobs: when each began
#: and ended, in seconds since 1970, and the first step that it logged.
RUN = "run.json"
HYPERPARAMS = "hparams.json"
ARTIFACTS = "artifacts"


class RunFolder:
    """The folder of one run, locked for this process until `end`.

    Attributes:
        path: the folder.
        run_id: the run's id, which a resumed run keeps.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self.path, self.run_id = path, run_id
        self._jobs: list[dict[str, Any]] = []
        self._lock = FolderLock(str(path))

    @classmethod
    def create(cls, parent: Path) -> RunFolder:
        """Create the folder of a new run, ``version_N``."""
        run = cls(new_version(parent), uuid4().hex)
        run.begin()
        return run

    @classmethod
    def find(cls, parent: Path, run_id: str) -> RunFolder | None:
        """Return the folder with the run of that id; None if there is none."""
        for file in sorted(parent.glob(f"*/{RUN}")):
            if _read(file).get("run_id") == run_id:
                return cls(file.parent, run_id)
        return None

    def lock(self) -> bool:
        """Lock the folder for this process; return False if another process records this run."""
        return self._lock.take()

    def unlock(self) -> None:
        """Release the folder."""
        self._lock.release()

    def begin(self) -> None:
        """Lock the folder and record the run as running."""
        self._lock.take()
        before = _read(self.path / RUN).get("jobs")
        self._jobs = [*(before if isinstance(before, list) else []), {"begun": time.time()}]
        self._write_status("running", None)

    def began_at(self, step: int) -> None:
        """Record the first step of this job."""
        if "first_step" not in self._jobs[-1]:
            self._jobs[-1]["first_step"] = step
            self._write_status("running", None)

    def end(self, error: BaseException | None) -> None:
        """Record how the run ended, and release the folder."""
        self._jobs[-1]["ended"] = time.time()
        self._write_status("finished" if error is None else "failed", error)
        self._lock.release()

    def _write_status(self, status: str, error: BaseException | None) -> None:
        reason = None if error is None else f"{type(error).__name__}: {error}"
        write_json(self.path / RUN, {"run_id": self.run_id, "status": status, "error": reason, "jobs": self._jobs})

    def hyperparams(self) -> dict[str, Any]:
        """Return the hyperparameters of the run."""
        return _read(self.path / HYPERPARAMS)

    def add_hyperparams(self, params: Mapping[str, HyperParameter]) -> dict[str, Any]:
        """Add hyperparameters to those of the run, and return all."""
        found = {**self.hyperparams(), **params}
        write_json(self.path / HYPERPARAMS, found)
        return found

    def add_artifact(self, name: str, value: Artifact, step: int | None) -> Path:
        """Write an artifact: a PNG, CSV or text file, or a copy of a file."""
        kind, at = artifact_kind(value), "" if step is None else f"@{step}"
        suffix = {"image": ".png", "table": ".csv", "text": ".txt"}.get(kind, Path(str(value)).suffix)
        target = self.path / ARTIFACTS / f"{name.removesuffix(suffix)}{at}{suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f"{target.name}.part")
        if isinstance(value, Path):
            shutil.copyfile(value, draft)
        elif isinstance(value, str):
            draft.write_bytes(value.encode("utf-8", "surrogateescape"))
        elif isinstance(value, (list, tuple)):
            _write_table(draft, value)
        else:
            draft.write_bytes(encode_png(value))  # type: ignore[arg-type]  # the only kind that is left
        os.replace(draft, target)
        return target

    def take_over(self, other: RunFolder) -> None:
        """Move hyperparameters and artifacts of another run here, and remove its folder."""
        if (other.path / HYPERPARAMS).exists():
            self.add_hyperparams(other.hyperparams())
        for file in sorted(path for path in other.path.rglob("*") if path.is_file()):
            if file.name not in (RUN, HYPERPARAMS):
                target = self.path / file.relative_to(other.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        other.unlock()
        shutil.rmtree(other.path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # absent, or of another program
    return found if isinstance(found, dict) else {}


def _write_table(path: Path, rows: Any) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
