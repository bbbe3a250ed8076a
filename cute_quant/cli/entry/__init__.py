"""The console script, installed as a module of its own beside the package.

Anything inside of the package imports torch first, which takes longer than printing a version.
"""
