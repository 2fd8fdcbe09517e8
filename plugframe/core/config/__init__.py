"""What was asked for, and where: the code, the command line, a variable, a settings file."""
