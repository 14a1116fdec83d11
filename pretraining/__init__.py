"""How the built-in model `compact` is made: data, pretraining, and the way into the package. Not in the wheel."""
