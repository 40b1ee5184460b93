"""Jobs on a real SLURM of two nodes, both of them this machine; `make test-slurm`."""
