"""Forks: changes that researchers make, each in one file that changes no file of the project. docs/forking.md has
more."""
