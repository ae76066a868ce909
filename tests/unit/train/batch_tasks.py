"""What a rank does for test_batch: megatrain.train.batch imports Megatron."""

from typing import Any

from megatrain.api.session import current_session


def plan_all(cases: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Return plan_bins of each case."""
    from megatrain.train.bins import plan_bins

    return [plan_bins(**case) for case in cases]


def pack_all(batches: list[Any], **options: Any) -> list[dict[str, Any]]:
    """Return this rank's micro-batches of each batch, as lists, and the batch's slots."""
    from megatrain.train.batch import BatchPlan
    from megatrain.train.datum import BatchRules, check_batch

    result = []
    for batch in batches:
        rules = BatchRules(vocab_size=512)
        data = check_batch(batch, rules)
        plan = BatchPlan(data, current_session().groups, rules, **options)
        packs = [
            {
                "ids": m.input_ids_1T[0].tolist(),
                "positions": m.positions_1T[0].tolist(),
                "index": m.label_index_N.tolist(),
                "targets": m.targets_N.tolist(),
                "places": m.places_N.tolist(),
                "slots": m.slots_N.tolist(),
                "segments": [
                    (s.q_start, s.num_queries, s.k_start, s.num_keys) for s in m.packed.segments
                ],
            }
            for m in plan.micro_batches()
        ]
        result.append({"packs": packs, "num_slots": plan.num_slots, "num_labels": plan.num_labels})
    return result


def pack_with(batches: list[Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return pack_all with keyword options (a task has positional arguments only)."""
    return pack_all(batches, **options)
