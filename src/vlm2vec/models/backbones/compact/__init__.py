"""The built-in model `compact`, its parts, and the dual encoder made of the same parts."""
