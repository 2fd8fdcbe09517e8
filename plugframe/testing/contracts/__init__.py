"""Contract suites for plugins: one per kind, to be subclassed by plugin authors."""
