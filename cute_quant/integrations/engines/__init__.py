"""Plug-ins of inference engines: their calls that quantize are taken over where they stand.

``takeover`` says what a call is, ``engine`` which calls an engine has and what becomes of them,
``imports`` waits for modules, and each engine has a module with its calls. Loading a plug-in
imports neither the engine's layers nor CuTe DSL, and touches no GPU.
"""

ENGINES = {
    "vllm": "cute_quant.integrations.engines.vllm",
    "sglang": "cute_quant.integrations.engines.sglang",
}
"""Modules of the engines, whose ``ENGINE`` is an ``engine.Engine``."""
