"""Hang reports, the log of collective calls, and consistency checks across ranks."""
