"""Reading rows, drawing batches, preparing the demo benchmark."""
