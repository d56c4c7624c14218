"""Processes of a job: on this machine, under torchrun, or under Slurm."""
