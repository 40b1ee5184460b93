"""The sparse side: tables, how they are sharded, and the optimizers that update them inside the backward pass."""
