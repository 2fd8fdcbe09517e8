"""Train modules sharded by ``torch.distributed.fsdp.fully_shard``."""
