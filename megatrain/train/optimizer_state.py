"""Which state an optimizer keeps for each entry of a parameter, by torch's names."""

import torch


def state_keys(optimizer: torch.optim.Optimizer, group: int) -> tuple[str, ...]:
    """Return the keys of the state that a parameter group has after its first step."""
    options = optimizer.param_groups[group]
    if options.get("use_muon"):
        return ("step", "momentum_buffer")
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",) if options["momentum"] else ()
    extra = ("max_exp_avg_sq",) if options.get("amsgrad") else ()
    return ("step", "exp_avg", "exp_avg_sq", *extra)
