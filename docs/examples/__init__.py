"""Ports to read and to copy from, and the files of `resa exercise`."""
