"""Code of strategies with ``DTensor`` parameters: clipping, optimizer remapping, state, meshes."""
