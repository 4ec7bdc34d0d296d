"""Kernels for NVIDIA GPUs; ``ops.kernels`` says when they run. Importing one of these files imports triton."""
