"""The public operations: calls on tensors with memory are launched, a tracer gets an operator."""
