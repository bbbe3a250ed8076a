"""Dispatch: from a torch call to a launch, through plans of recent calls or torch operators."""
