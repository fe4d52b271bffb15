"""Kernels on raw arrays, one folder per operation; knows JAX and nothing of lutjax."""
