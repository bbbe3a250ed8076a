"""Faults in keys, cache, ahead-of-time directories and toolchain, and in integrations."""

from tests.mutants.fault import Fault

KEYS = "jit/keys.py"
DISK_CACHE = "jit/disk_cache.py"
TRUSTED_FILES = "jit/trusted_files.py"
SHARED_OBJECTS = "jit/shared_objects.py"
MANIFEST = "jit/aot_manifest.py"
AOT_LOAD = "jit/aot_load.py"
LOOKUP = "jit/lookup.py"
COMPILATION = "jit/compilation.py"
DSL_PRIVATE = "jit/dsl_private.py"
DSL_VARIABLES = "jit/dsl_variables.py"
PROGRESS = "jit/progress.py"
REACHABLE = "dispatch/reachable.py"
INFO = "cli/info.py"
TOOLCHAIN = "jit/toolchain.py"
DEEP_GEMM = "integrations/deep_gemm.py"
VLLM = "integrations/vllm.py"

ON_CHECKS = "tests/contract/test_checks.py"
ON_DISK_CACHE = "tests/jit/test_disk_cache.py"
ON_TRUSTED_FILES = "tests/jit/test_trusted_files.py"
ON_AHEAD_OF_TIME = "tests/jit/test_ahead_of_time.py"
ON_DSL_PRIVATE = "tests/jit/test_dsl_private.py"
ON_DSL_VARIABLES = "tests/jit/test_dsl_variables.py"
ON_FORK = "tests/jit/test_fork.py"
ON_PROGRESS = "tests/jit/test_progress.py"
ON_WARM_UP = "tests/dispatch/test_warm_up.py"
ON_CLI = "tests/cli/test_cli.py"
ON_TOOLCHAIN = "tests/jit/test_toolchain.py"
ON_VLLM = "tests/integrations/test_vllm.py"

FAULTS = [
    Fault(
        "keys-format-is-its-group-size",
        KEYS,
        "if isinstance(value, Format):\n        return value.text",
        "if isinstance(value, Format):\n        return str(value.group_size)",
        [f"{ON_DISK_CACHE}::test_specs_differ_in_text_key_and_name"],
    ),
    Fault(
        "keys-source-without-name",
        KEYS,
        'digest.update(f"{path.relative_to(package)} {len(content)}\\n".encode())',
        "pass",
        [f"{ON_DISK_CACHE}::test_adding_a_kernel_changes_the_key"],
    ),
    Fault(
        "keys-sources-of-kernels",
        KEYS,
        '    "contract/dtypes.py",\n',
        "",
        [f"{ON_DISK_CACHE}::test_sources_are_all_that_kernels_import"],
    ),
    Fault(
        "keys-heuristics-are-sources",
        KEYS,
        "if path.name in NOT_COMPILED:",
        "if False:",
        [f"{ON_DISK_CACHE}::test_editing_anything_else_does_not_change_the_key"],
    ),
    Fault(
        "cache-key-without-arch",
        DISK_CACHE,
        '"arch": arch,',
        '"arch": "",',
        [f"{ON_DISK_CACHE}::test_key_depends_on_architecture_and_options_and_nothing_else"],
    ),
    Fault(
        "cache-key-without-options",
        DISK_CACHE,
        '"options": [options, dsl_variables.compiled_in()],',
        '"options": [dsl_variables.compiled_in()],',
        [f"{ON_DISK_CACHE}::test_key_depends_on_architecture_and_options_and_nothing_else"],
    ),
    Fault(
        "cache-key-without-compiler",
        DISK_CACHE,
        '"dsl": [dsl.version, dsl.flavour],',
        '"dsl": [dsl.version],',
        [f"{ON_DISK_CACHE}::test_key_depends_on"],
    ),
    Fault(
        "cache-key-without-processor",
        DISK_CACHE,
        '"cpu": [host.triple, host.cpu],',
        '"cpu": [],',
        [f"{ON_DISK_CACHE}::test_key_depends_on"],
    ),
    Fault(
        "cache-directory-of-others",
        DISK_CACHE,
        "if status.st_mode & 0o077:",
        "if False:",
        [f"{ON_DISK_CACHE}::test_directories_of_others_are_refused"],
    ),
    Fault(
        "cache-directory-of-another-user",
        DISK_CACHE,
        '    if status.st_uid != os.geteuid():\n        raise Untrusted(f"{directory} belongs',
        '    if False:\n        raise Untrusted(f"{directory} belongs',
        [f"{ON_DISK_CACHE}::test_directory_of_another_user"],
    ),
    Fault(
        "cache-parents-that-others-may-write",
        TRUSTED_FILES,
        "if status.st_mode & OTHERS_WRITE and not status.st_mode & stat.S_ISVTX:",
        "if False:",
        [
            f"{ON_DISK_CACHE}::test_parents_that_anybody_may_write_to",
            f"{ON_DISK_CACHE}::test_parents_that_others_may_change",
        ],
    ),
    Fault(
        "cache-entry-that-is-a-link",
        TRUSTED_FILES,
        "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC",
        "os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC",
        [f"{ON_DISK_CACHE}::test_entries_that_are_links"],
    ),
    Fault(
        "cache-readonly-is-written",
        DISK_CACHE,
        'return Cache(directory, writable and chosen == "on", files)',
        "return Cache(directory, writable, files)",
        [f"{ON_DISK_CACHE}::test_readonly"],
    ),
    Fault(
        "cache-not-bounded",
        DISK_CACHE,
        "if total <= MAX_BYTES:",
        "if True:",
        [f"{ON_DISK_CACHE}::test_size_is_bounded"],
    ),
    Fault(
        "cache-oldest-kept",
        DISK_CACHE,
        "for _, size, name in sorted(files):",
        "for _, size, name in sorted(files, reverse=True):",
        [f"{ON_DISK_CACHE}::test_size_is_bounded"],
    ),
    Fault(
        "cache-waits-for-each-lock",
        DISK_CACHE,
        "0.0 if wait else self._patience",
        "self._patience",
        [f"{ON_DISK_CACHE}::test_who_waited_in_vain_does_not_wait_again"],
    ),
    Fault(
        "objects-digest-not-compared",
        SHARED_OBJECTS,
        "if length > end or _digest(body, length) != digest:",
        "if length > end:",
        [f"{ON_DISK_CACHE}::test_damaged_entries_are_discarded"],
    ),
    Fault(
        "objects-magic-not-compared",
        SHARED_OBJECTS,
        "if magic != _MAGIC:",
        "if False:",
        [f"{ON_DISK_CACHE}::test_damaged_entries_are_discarded"],
    ),
    Fault(
        "file-that-others-may-write",
        TRUSTED_FILES,
        "if status.st_mode & OTHERS_WRITE:\n        permissions",
        "if False:\n        permissions",
        [f"{ON_AHEAD_OF_TIME}::test_directory_that_others_may_write_to"],
    ),
    Fault(
        "file-of-somebody-else",
        TRUSTED_FILES,
        'if status.st_uid not in (0, os.geteuid()):\n        raise Untrusted(f"{path}: expected',
        'if False:\n        raise Untrusted(f"{path}: expected',
        [
            f"{ON_AHEAD_OF_TIME}::test_directory_of_somebody_else",
            f"{ON_AHEAD_OF_TIME}::test_manifest_of_somebody_else",
        ],
    ),
    Fault(
        "links-that-others-may-change",
        TRUSTED_FILES,
        "if owner not in (0, os.geteuid()) or parent.st_mode & OTHERS_WRITE:",
        "if False:",
        [f"{ON_TRUSTED_FILES}::test_link_in_a_directory_that_others_may_write_to"],
    ),
    Fault(
        "aot-names-outside-of-the-directory",
        MANIFEST,
        'and Path(kernel["file"]).name == kernel["file"]',
        "and True",
        [f"{ON_AHEAD_OF_TIME}::test_names_in_manifest_are_of_the_directory"],
    ),
    Fault(
        "parent-of-somebody-else",
        TRUSTED_FILES,
        "if status.st_uid not in (0, os.geteuid()):\n        raise Untrusted(\n",
        "if False:\n        raise Untrusted(\n",
        [f"{ON_TRUSTED_FILES}::test_parent_of_another_user"],
    ),
    Fault(
        "directory-opened-by-its-path-again",
        TRUSTED_FILES,
        'path = f"/proc/self/fd/{self.descriptor}/{name}"',
        "path = str(self.path / name)",
        [f"{ON_TRUSTED_FILES}::test_what_is_loaded_is_what_was_checked"],
    ),
    Fault(
        "link-of-another-user",
        TRUSTED_FILES,
        "if owner not in (0, os.geteuid()) or parent",
        "if parent",
        [f"{ON_TRUSTED_FILES}::test_link_of_another_user"],
    ),
    Fault(
        "aot-object-of-another-kernel",
        AOT_LOAD,
        "if record != kernel:",
        "if False:",
        [f"{ON_AHEAD_OF_TIME}::test_object_of_another_kernel_is_not_loaded"],
    ),
    Fault(
        "aot-runtime-not-compared",
        AOT_LOAD,
        "if _digest_beside_import(files) != digest:",
        "if False:",
        [f"{ON_AHEAD_OF_TIME}::test_tampered_runtime_is_not_loaded"],
    ),
    Fault(
        "aot-sources-not-compared",
        AOT_LOAD,
        "if manifest[name] != expected:",
        "if False:",
        [f"{ON_AHEAD_OF_TIME}::test_built_for_something_else"],
    ),
    Fault(
        "aot-later-directories-asked-last",
        AOT_LOAD,
        "_loaded.insert(0, open_directory(Path(path).absolute()))",
        "_loaded.append(open_directory(Path(path).absolute()))",
        [f"{ON_AHEAD_OF_TIME}::test_directories_loaded_later_are_asked_first"],
    ),
    Fault(
        "lookup-compiled-again",
        LOOKUP,
        "built = aot_load.find(spec, arch)",
        "built = None",
        [f"{ON_AHEAD_OF_TIME}::test_without_cute_dsl"],
    ),
    Fault(
        "lookup-output-asked-of-the-compiler",
        LOOKUP,
        "if dsl is None or dsl_variables.asks_for_output():",
        "if dsl is None:",
        [f"{ON_DISK_CACHE}::test_output_asked_of_the_compiler_bypasses_the_cache"],
    ),
    Fault(
        "variables-zero-asks-for-output",
        DSL_VARIABLES,
        '("", "0", "false", "off", "no")',
        '("",)',
        [f"{ON_DSL_VARIABLES}::test_variables_that_ask_for_output"],
    ),
    Fault(
        "variables-of-places-in-the-key",
        DSL_VARIABLES,
        "not in OUTPUT | REFUSED | NEUTRAL",
        "not in OUTPUT | REFUSED",
        [f"{ON_DSL_VARIABLES}::test_key_depends_on_no_other"],
    ),
    Fault(
        "variables-of-code-forgotten",
        DSL_VARIABLES,
        '        "LINEINFO",\n',
        "",
        [f"{ON_DSL_VARIABLES}::test_every_variable_of_the_installed_dsl_is_known"],
    ),
    Fault(
        "variables-of-code-taken-for-neutral",
        DSL_VARIABLES,
        "for name, value in sorted(os.environ.items())",
        "for name, value in ()",
        [f"{ON_DSL_VARIABLES}::test_key_depends_on_variables_of_code"],
    ),
    Fault(
        "dry-run-compiles",
        COMPILATION,
        "if variable is not None:",
        "if False:",
        [f"{ON_DSL_VARIABLES}::test_dry_run_is_refused_by_name"],
    ),
    Fault(
        "arguments-of-the-caller-parsed",
        DSL_PRIVATE,
        "[] if shielded else args",
        "args",
        [f"{ON_DSL_PRIVATE}::test_arguments_are_hidden_in_one_thread_alone"],
    ),
    Fault(
        "arguments-hidden-from-every-thread",
        DSL_PRIVATE,
        'args is None and getattr(_thread, "shielded", False)',
        "args is None",
        [f"{ON_DSL_PRIVATE}::test_arguments_are_hidden_in_one_thread_alone"],
    ),
    Fault(
        "arguments-parsed-by-a-parser-that-was-kept",
        DSL_PRIVATE,
        "kept.cache_clear()",
        "pass",
        [f"{ON_DSL_PRIVATE}::test_arguments_of_the_caller_are_not_read"],
    ),
    Fault(
        "fork-inherits-locks",
        COMPILATION,
        "lock, load_lock = threading.RLock(), threading.RLock()",
        "pass",
        [f"{ON_FORK}::test_children_of_a_process_that_compiles"],
    ),
    Fault(
        "fork-compiles-with-half-of-a-compiler",
        COMPILATION,
        "_forked_meanwhile |= _compiling",
        "pass",
        [f"{ON_FORK}::test_children_of_a_process_that_compiles"],
    ),
    Fault(
        "capture-compiles",
        LOOKUP,
        "if key not in _functions and compilation.is_capturing():",
        "if False:",
        [f"{ON_WARM_UP}::test_nothing_is_compiled_or_loaded_while_a_graph_is_captured"],
    ),
    Fault(
        "compilation-never-forbidden",
        COMPILATION,
        "if _forbidden:",
        "if False:",
        [f"{ON_WARM_UP}::test_what_is_missing_under_forbid_compilation"],
    ),
    Fault(
        "compilation-forbidden-for-good",
        COMPILATION,
        "_forbidden -= 1",
        "pass",
        [f"{ON_WARM_UP}::test_forbidding_nests_and_ends"],
    ),
    Fault(
        "compilation-permitted-twice",
        COMPILATION,
        "if not self._ended:",
        "if True:",
        [f"{ON_WARM_UP}::test_forbidding_nests_and_ends"],
    ),
    Fault(
        "warm-up-of-one-size-class",
        REACHABLE,
        "{*(1 << i for i in range(max_rows.bit_length())), min(3, max_rows), max_rows}",
        "{1}",
        [f"{ON_WARM_UP}::test_nothing_is_compiled_after_a_warm_up"],
    ),
    Fault(
        "warm-up-of-contiguous-rows",
        REACHABLE,
        "first = min(least, math.gcd(LOAD_BYTES, row_bytes))",
        "first = math.gcd(LOAD_BYTES, row_bytes)",
        [f"{ON_WARM_UP}::test_nothing_is_compiled_after_a_warm_up"],
    ),
    Fault(
        "warm-up-of-aligned-rows",
        REACHABLE,
        "first = min(least, math.gcd(LOAD_BYTES, row_bytes))",
        "first = least",
        [f"{ON_WARM_UP}::test_nothing_is_compiled_after_a_warm_up"],
    ),
    Fault(
        "warm-up-without-residuals",
        REACHABLE,
        "residual = normalized = (False, True)",
        "normalized = (False, True)",
        [f"{ON_WARM_UP}::test_nothing_is_compiled_after_a_warm_up"],
    ),
    Fault(
        "info-does-not-try-the-cache",
        INFO,
        "store.try_out()",
        "pass",
        [f"{ON_CLI}::test_info_tries_the_cache"],
    ),
    Fault(
        "progress-silent-for-long",
        PROGRESS,
        "QUIET_SECONDS = 0.5",
        "QUIET_SECONDS = 50.0",
        [f"{ON_PROGRESS}::test_a_call_that_compiles_says_so_on_a_terminal"],
    ),
    Fault(
        "toolchain-runtime-newer-than-the-driver",
        TOOLCHAIN,
        "if driver is None or major <= driver[0]]",
        "if True]",
        [f"{ON_TOOLCHAIN}::test_the_newest_flavour_that_the_driver_runs"],
    ),
    Fault(
        "deep-gemm-floor",
        DEEP_GEMM,
        'fmt = DEEP_GEMM.replace(group_size=gran_k, min_scale="deepgemm")',
        "fmt = DEEP_GEMM.replace(group_size=gran_k)",
        [f"{ON_VLLM}::test_deep_gemm_packed_cast"],
    ),
    Fault(
        "deep-gemm-scales-not-rounded",
        DEEP_GEMM,
        "round_scale=use_ue8m0,",
        "round_scale=False,",
        [f"{ON_VLLM}::test_deep_gemm_cast"],
    ),
    Fault(
        "vllm-eps-in-float64",
        VLLM,
        "to_float32(float(eps)) / E4M3_MAX",
        "float(eps) / E4M3_MAX",
        [f"{ON_VLLM}::test_eps_is_rounded_to_float32"],
    ),
    Fault(
        "vllm-floor-of-its-own",
        VLLM,
        "max(to_float32(float(eps)) / E4M3_MAX, VLLM_MIN_SCALE)",
        "to_float32(float(eps)) / E4M3_MAX",
        [f"{ON_VLLM}::test_vllm"],
    ),
    Fault(
        "vllm-rows-of-a-batch",
        VLLM,
        "if x.shape[-1] % group_size:",
        "if False:",
        [f"{ON_CHECKS}::test_vllm"],
    ),
]
