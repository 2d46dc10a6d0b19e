"""Weights as they lie on a disk, on the hub or in a package: found, checked and hashed before anything is loaded."""
