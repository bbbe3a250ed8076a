"""Functions with the names, arguments and bits of other libraries: DeepGEMM and vLLM."""
