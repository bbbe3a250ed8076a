"""The sources that vLLM's quantizers are compiled from, and how they are registered."""

import pytest

from bench import vllm_operators

BINDINGS = """
#include "ops.h"
STABLE_TORCH_LIBRARY_FRAGMENT(_C, ops) {
  // One of others.
  ops.def("other(Tensor x) -> Tensor");
  ops.def(
      "quantize(Tensor x, "
      "Tensor! q) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(_C, CUDA, ops) {
  ops.impl("other", TORCH_BOX(&other));
  ops.impl("quantize",
           TORCH_BOX(&quantize_on_cuda));
}
"""


def test_bindings_of_some_operators():
    text = vllm_operators.bindings(BINDINGS, ["quantize"])
    assert 'ops.def("quantize(Tensor x, Tensor! q) -> ()");' in text
    assert 'ops.impl("quantize", TORCH_BOX(&quantize_on_cuda));' in text
    assert "other" not in text


def test_an_operator_that_is_missing_is_named():
    with pytest.raises(ValueError, match="has no rows"):
        vllm_operators.bindings(BINDINGS, ["quantize", "rows"])


def test_files_with_what_they_include(tmp_path):
    """Beside the file, or under the root, and of no other library."""
    texts = {name: "" for name in (*vllm_operators.SOURCES, "ops.h", "torch_bindings.cpp")}
    first = vllm_operators.SOURCES[0]
    texts[first] = '#include <cuda.h>\n#include "near.cuh"\n  #include "core/far.h"\n'
    texts["quantization/w8a8/fp8/near.cuh"] = '#include "../../up.h"\n'
    texts |= {"core/far.h": "", "quantization/up.h": "", "quantization/unused.h": ""}
    # All operators are registered there, with headers of all.
    texts["torch_bindings.cpp"] = '#include "quantization/unused.h"\n'
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = {str(path.relative_to(tmp_path)) for path in vllm_operators.files(tmp_path)}
    assert found == texts.keys() - {"quantization/unused.h"}
