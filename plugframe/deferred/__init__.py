"""Build a module of any size without storage, and materialize its tensors one by one."""
