"""What strategies share whose parameters are ``DTensor``: clipping, carrying optimizers over, state, meshes."""
