"""From what was asked and what is installed to a plan, with a reason for every choice."""
