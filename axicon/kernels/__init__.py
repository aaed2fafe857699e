"""Kernels: C++ for the CPU, each with a torch reference and a reason when it cannot run."""
