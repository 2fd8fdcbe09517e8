"""Base classes for plugin authors: subclass one, override hooks and mark them with ``@hookimpl``.

These import torch; a descriptor's module does not import them.
"""

from plugframe.base.accelerator import Accelerator
from plugframe.base.checkpoint import Checkpoint
from plugframe.base.collective import Collective, check_reduction, check_split
from plugframe.base.device_mesh import make_device_mesh
from plugframe.base.environment import Environment, fresh, private_store
from plugframe.base.extension import Extension
from plugframe.base.launcher import Launcher
from plugframe.base.logger import Logger
from plugframe.base.precision import Precision, cast_floating, default_dtype
from plugframe.base.strategy import ForwardShim, Strategy
from plugframe.utils.buffers import replicated_buffers, sync_buffers
from plugframe.utils.devices import parse_devices
from plugframe.utils.expanded import overwrite, stored
from plugframe.utils.gathered import is_gathered, mark_gathered
from plugframe.utils.logging import failing, size_text, tell, warn_caller
from plugframe.utils.references import repoint
from plugframe.utils.serialization import job_token, pack, unpack
from plugframe.utils.tree import map_tensors

__all__ = [
    "Accelerator",
    "Checkpoint",
    "Collective",
    "Environment",
    "Extension",
    "ForwardShim",
    "Launcher",
    "Logger",
    "Precision",
    "Strategy",
    "cast_floating",
    "check_reduction",
    "check_split",
    "default_dtype",
    "failing",
    "fresh",
    "is_gathered",
    "job_token",
    "make_device_mesh",
    "map_tensors",
    "mark_gathered",
    "overwrite",
    "pack",
    "parse_devices",
    "private_store",
    "replicated_buffers",
    "repoint",
    "size_text",
    "stored",
    "sync_buffers",
    "tell",
    "unpack",
    "warn_caller",
]
