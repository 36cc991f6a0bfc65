"""The Trainer of transformers with a loss that is learned: a small vision transformer on digits.

pip install "lossmeta[integrations]", then python examples/transformers_online_loss.py
"""

import tempfile
from functools import partial

import torch
from sklearn.datasets import load_digits
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from lossmeta.adalfl import OnlineLearner
from lossmeta.integrations.transformers import OnlineTrainer
from lossmeta.losses import LossNetwork

set_seed(0)
images, labels = load_digits(return_X_y=True)
pixels = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]
order = torch.randperm(len(data)).tolist()
train, valid = ([data[i] for i in part] for part in (order[:1200], order[1200:]))

model = ViTForImageClassification(
    ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=10,
    )
)
loss = LossNetwork(residual="cross_entropy", normalize_slope=True)
arguments = TrainingArguments(
    tempfile.mkdtemp(),
    num_train_epochs=20,
    per_device_train_batch_size=64,
    learning_rate=5e-3,
    use_cpu=True,
    report_to=[],
    save_strategy="no",
)
trainer = OnlineTrainer(
    learned_loss=loss,
    make_learner=partial(OnlineLearner, meta_optimizer=torch.optim.Adam(loss.parameters(), lr=1e-3)),
    model=model,
    args=arguments,
    train_dataset=train,
    eval_dataset=valid,
    compute_metrics=lambda result: {
        "accuracy": float((result.predictions.argmax(1) == result.label_ids).mean())
    },
)
trainer.train()
print(f"accuracy after {trainer.state.global_step} steps: {trainer.evaluate()['eval_accuracy']:.3f}")
