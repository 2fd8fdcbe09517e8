"""A running job: its plugins registered, checked, bound, set up and torn down."""
