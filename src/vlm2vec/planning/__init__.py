"""What a job costs, from a model's configuration alone: parameters, memory, FLOPs, time. Needs no weights."""
