"""The stages data, train and eval; they meet through files only."""

import os

# DDP warns on every rank that `find_unused_parameters` found none; shard_model sets it for another reason.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
