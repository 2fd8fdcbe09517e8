"""A descriptor that needs a library this machine does not have."""

raise ImportError("libacme.so.3: cannot open shared object file")
