"""The training step: loss, gradients, accumulation, clipping, loss scaling, update."""
