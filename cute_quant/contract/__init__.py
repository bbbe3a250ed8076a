"""The contract: what results are, their reference in plain torch, and checks of arguments."""
