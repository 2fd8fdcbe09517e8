"""Fully sharded training with ``torch.distributed.fsdp.fully_shard``."""
