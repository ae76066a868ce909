"""A model learns who it is: LoRA on one device, in a script of one's own.

    python examples/01_self_cognition.py

Rows have a query and a response with {{NAME}} and {{AUTHOR}}, in Chinese or English.
"""

from peft import LoraConfig

from megatrain import DataLoader, Dataset, DatasetMeta, MegatronModel, SelfCognitionProcessor

MODEL = "models/dense"


def train() -> None:
    """Train an adapter and save it to `output/01-self-cognition`."""
    dataset = Dataset(DatasetMeta("examples/data/self_cognition.jsonl"))
    dataset.set_template("Template", model_id=MODEL)
    dataset.map(SelfCognitionProcessor(["小梅", "Mega"], ["实验室", "the Lab"]))
    dataset.encode()
    dataloader = DataLoader(dataset, batch_size=8)

    model = MegatronModel(MODEL, mixed_precision="no")
    model.add_adapter_to_model(
        "default", LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    )
    model.set_optimizer("AdamW", lr=5e-3)
    model.set_lr_scheduler(
        "CosineWarmupScheduler", num_warmup_steps=5, num_training_steps=3 * len(dataloader)
    )
    for _ in range(3):
        for batch in dataloader:
            model.forward_backward(inputs=batch)
            model.clip_grad_and_step()
        metric = model.calculate_metric(is_training=True)
        print(f"step {metric['step']:.0f}: loss {metric['loss']:.4f}")
    print(model.save("01-self-cognition"))


if __name__ == "__main__":
    train()
