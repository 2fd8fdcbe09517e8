"""``plugframe convert``: rewrite a training script to use `Lite`."""
