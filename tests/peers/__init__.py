"""Formulas of other libraries, and their own code to hold the formulas to."""
