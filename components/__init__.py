"""TorchX components of the three stages."""
