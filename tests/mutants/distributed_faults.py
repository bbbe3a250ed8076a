"""Faults in expert parallelism and in the shardings of DTensor."""

from tests.mutants.fault import Fault

ROUTING = "distributed/routing.py"
EXCHANGE = "distributed/exchange.py"
PEERS = "distributed/peers.py"
ARRIVAL = "kernels/arrival.py"
PTX = "kernels/ptx.py"
COMBINATION = "distributed/combination.py"
COMBINE = "kernels/combine.py"
SHARDING = "distributed/sharding.py"
TORCH_PRIVATE = "contract/torch_private.py"

ON_EXPERTS = "tests/distributed/test_expert_parallel.py"
ON_ARRIVAL = "tests/kernels/test_arrival.py"
ON_BARRIER = "tests/kernels/test_barrier.py"
ON_COMBINE = "tests/kernels/test_combine.py"
ON_DTENSOR = "tests/distributed/test_dtensor.py"
THERE_AND_BACK = f"{ON_EXPERTS}::test_there_and_back"

FAULTS = [
    Fault(
        "route-records-of-all-experts",
        ROUTING,
        "    of_rank = of_rank.where((of_rank >= 0) & (of_rank < local), -1)\n",
        "    of_rank = of_rank.where(of_rank >= 0, -1).clamp(max=local - 1)\n",
        [THERE_AND_BACK],
    ),
    Fault(
        "route-groups-without-alignment",
        ROUTING,
        "        padded = align(count, alignment)\n",
        "        padded = count\n",
        [THERE_AND_BACK],
    ),
    Fault(
        "route-dropped-are-not-counted",
        ROUTING,
        "    dropped = (known & ~fits).sum(dtype=torch.int32)\n",
        "    dropped = (known & ~known).sum(dtype=torch.int32)\n",
        [f"{ON_EXPERTS}::test_rows_that_find_no_place"],
    ),
    Fault(
        "route-ends-past-the-rows",
        ROUTING,
        "PrefixSum((start + count).clamp(max=num_rows).int(), alignment)",
        "PrefixSum((start + count).int(), alignment)",
        [f"{ON_EXPERTS}::test_rows_that_find_no_place"],
    ),
    Fault(
        "exchange-scales-of-rows-that-do-not-exist",
        ROUTING,
        "        received[-1].zero_()\n",
        "        received[-1].fill_(1)\n",
        [THERE_AND_BACK],
    ),
    Fault(
        "exchange-only-as-many-ranks-as-places",
        EXCHANGE,
        "    for first in range(0, places.shape[1], MAX_PLACES):\n",
        "    for first in range(0, 1, MAX_PLACES):\n",
        [f"{ON_EXPERTS}::test_more_ranks_than_a_row_has_places"],
    ),
    Fault(
        "combine-reads-rows-that-do-not-exist",
        COMBINATION,
        "        total += row.where((place >= 0).unsqueeze(1), 0.0)\n",
        "        total += row * (place >= 0).unsqueeze(1)\n",
        [THERE_AND_BACK],
    ),
    Fault(
        "combine-without-weights",
        COMBINATION,
        "        if factors is not None:\n",
        "        if factors is None:\n",
        [THERE_AND_BACK],
    ),
    Fault(
        "combine-fuses-products-with-sums",
        COMBINE,
        "terms[j] = ptx.mul_rn(terms[j], of_row)",
        "terms[j] = terms[j] * of_row",
        [f"{ON_COMBINE}::test_machine_code"],
    ),
    Fault(
        "combine-adds-the-last-row-again",
        COMBINE,
        "            encodings.clear_unless(exists[i], registers[i])\n",
        "",
        [f"{ON_COMBINE}::test_sums"],
    ),
    Fault(
        "combine-only-as-many-choices-as-lanes",
        COMBINE,
        "for first in range(0, choices, LANES):",
        "for first in range(0, cutlass.min(choices, 1), LANES):",
        [f"{ON_COMBINE}::test_sums"],
    ),
    Fault(
        "combine-rows-past-the-last",
        COMBINE,
        "Uint32(place) < problem.rows.rows",
        "place >= 0",
        [f"{ON_COMBINE}::test_places_past_the_rows"],
    ),
    Fault(
        "combine-one-grid-of-records",
        COMBINE,
        "for first_record in range(0, records, MAX_GRID_Y):",
        "for first_record in range(0, 1, MAX_GRID_Y):",
        [f"{ON_COMBINE}::test_more_records_than_a_grid_counts"],
    ),
    Fault(
        "combine-rows-of-any-strides",
        COMBINATION,
        "contiguous = rows.shape[1] == 1 or strides[1] == 1",
        "contiguous = bool(strides)",
        [f"{ON_COMBINE}::test_rows_that_lie_apart"],
    ),
    Fault(
        "combine-waits-for-each-row",
        "kernels/config.py",
        "COMBINE_CTAS = 6",
        "COMBINE_CTAS = 12",
        [f"{ON_COMBINE}::test_machine_code"],
    ),
    Fault(
        "arrival-scales-of-another-row",
        ARRIVAL,
        "bits = Uint32(problem.words[Int64(source),",
        "bits = Uint32(problem.words[Int64(source ^ 1),",
        [f"{ON_ARRIVAL}::test_rows_of_a_prefix_sum"],
    ),
    Fault(
        "arrival-rows-past-a-count",
        ARRIVAL,
        "num_rows = row_domains.clamp(problem.counts[batch], num_rows)",
        "num_rows = num_rows",
        [f"{ON_ARRIVAL}::test_masked_experts"],
    ),
    Fault(
        "arrival-one-matrix-of-a-grid",
        ARRIVAL,
        "for batch in range(first_batch, problem.q.shape[0], step):",
        "for batch in range(first_batch, first_batch + 1, step):",
        [f"{ON_ARRIVAL}::test_masked_experts"],
    ),
    Fault(
        "peers-records-of-another-rank",
        PEERS,
        "first = self.rank * max_tokens",
        "first = 0",
        [THERE_AND_BACK],
    ),
    Fault(
        "peers-rows-that-do-not-exist-keep-what-memory-held",
        PEERS,
        "self.received[-1].zero_()",
        "pass",
        [THERE_AND_BACK],
    ),
    Fault(
        "peers-write-before-others-have-read",
        PEERS,
        "        self._write(x, plan, self.rank, upper)\n        self._barrier()\n",
        "        self._write(x, plan, self.rank, upper)\n",
        [f"{ON_EXPERTS}::test_ranks_wait_for_each_other"],
    ),
    Fault(
        "barrier-signal-that-overtakes-records",
        PTX,
        "st.release.sys",
        "st.relaxed.sys",
        [f"{ON_BARRIER}::test_machine_code"],
    ),
    Fault(
        "barrier-records-that-a-cache-held",
        PTX,
        "ld.acquire.sys",
        "ld.relaxed.sys",
        [f"{ON_BARRIER}::test_machine_code"],
    ),
    Fault(
        "route-rows-of-masked-experts-past-the-last",
        ROUTING,
        "fits = known & (position < num_rows)",
        "fits = known",
        [f"{ON_EXPERTS}::test_rows_that_find_no_place"],
    ),
    Fault(
        "peers-places-of-another-rank",
        PEERS,
        "scatter=plan.slots[rank]",
        "scatter=plan.slots[self.rank]",
        [THERE_AND_BACK],
    ),
    Fault(
        "sharding-of-parts-of-words",
        SHARDING,
        "k % (shards * fmt.group_size * fmt.groups_per_unit) == 0",
        "k % (shards * fmt.group_size) == 0",
        [ON_DTENSOR],
    ),
    Fault(
        "sharding-of-parts-of-blocks",
        SHARDING,
        "return not fmt.blocked or rows % (shards * fmt.block_rows) == 0",
        "return True",
        [ON_DTENSOR],
    ),
    Fault(
        "sharding-of-gates-and-ups",
        SHARDING,
        'if arguments["interleaved"] else []',
        "if True else []",
        [ON_DTENSOR],
    ),
    Fault(
        "sharding-of-counts-that-stay-whole",
        SHARDING,
        '            sharded["row_data"] = dimension\n',
        "            pass\n",
        [ON_DTENSOR],
    ),
    Fault(
        "sharding-that-forgets-the-format",
        TORCH_PRIVATE,
        "    propagator.op_to_schema_info[operator] = info\n",
        "    assert info is not None and propagator is not None\n",
        [ON_DTENSOR],
    ),
    Fault(
        "sharding-of-random-numbers",
        SHARDING,
        'for name in ("scatter", "rng_state"))',
        'for name in ("scatter",))',
        [ON_DTENSOR],
    ),
    Fault(
        "sharding-moves-what-is-written",
        SHARDING,
        "            found = [s for s in found if s.arguments.get(name) == dimension]\n",
        "            found = [s for s in found if s.arguments.get(name) == dimension or found]\n",
        [ON_DTENSOR],
    ),
]
