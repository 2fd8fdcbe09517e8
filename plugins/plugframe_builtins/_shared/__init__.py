"""Code shared by several built-in plugins; it imports none of them."""
