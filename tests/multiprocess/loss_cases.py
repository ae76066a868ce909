"""Every built-in loss of log-probabilities: name, options, and what a call gives."""

POLICY = ["old_logps", "advantages"]
TEACHER = ["teacher_tokens", "teacher_logps"]

LOSSES = [
    ("CrossEntropyLoss", {}, []),
    ("ImportanceSamplingLoss", {}, POLICY),
    ("PPOLoss", {}, POLICY),
    ("CISPOLoss", {}, POLICY),
    ("DROLoss", {}, POLICY),
    ("GSPOLoss", {}, POLICY),
    ("GRPOLoss", {"epsilon": 0.2, "beta": 0.04}, [*POLICY, "ref_logps"]),
    ("GRPOLoss", {"loss_type": "dapo", "delta": 3.0}, POLICY),
    ("GRPOLoss", {"loss_type": "dr_grpo", "max_completion_length": 40}, POLICY),
    ("GRPOLoss", {"loss_type": "grpo", "importance_sampling_level": "sequence"}, POLICY),
    ("MPOLoss", {}, ["ref_logps"]),
    ("DPOLoss", {"beta": 0.1}, ["ref_logps"]),
    ("DPOLoss", {"loss_type": "ipo"}, ["ref_logps"]),
    ("DPOLoss", {"reference_free": True}, []),
    ("SimPOLoss", {}, []),
    ("ORPOLoss", {}, []),
    ("KTOLoss", {}, ["ref_logps", "label", "kl"]),
    ("DistillationLoss", {}, TEACHER),
    ("DistillationLoss", {"divergence": "reverse_kl"}, TEACHER),
]
