"""Sharded checkpoints at a URL: on an object store, or any other fsspec file system."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.remote_checkpoint.checkpoint:RemoteCheckpoint",
    summary="a folder at a URL (s3://, gs://, memory://, …) to which every rank writes its shards, verified on load",
    provides=("sharded",),
    requires=("fsspec",),
    extra="plugframe[remote]",
    priority=None,
)
