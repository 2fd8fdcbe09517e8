"""Hang reports, the log of collective calls, and consistency checks over ranks."""
