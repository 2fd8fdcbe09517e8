"""What several built-in plugins use; it imports none of them."""
