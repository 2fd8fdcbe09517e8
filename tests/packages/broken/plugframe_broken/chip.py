"""An accelerator whose driver is not there: its descriptor loads, its implementation does not."""

raise ImportError("libchip.so: cannot open shared object file")
