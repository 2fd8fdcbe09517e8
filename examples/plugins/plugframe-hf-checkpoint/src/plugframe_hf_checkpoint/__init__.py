"""Checkpoints that Hugging Face's from_pretrained reads."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_hf_checkpoint.checkpoint:HuggingFaceCheckpoint",
    summary="A folder with config.json and sharded safetensors, as save_pretrained writes, and the rest of the run.",
    requires=("safetensors",),
    options=(
        Option("model", str, "model", "Key of the model in the saved state."),
        Option("shard_gb", float, 5.0, "Largest size of a file of weights in GB.", above=0),
    ),
)
