"""Small models and batches that several tests share."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)


def bert(layers=3, hidden=32, heads=4, labels=3):
    config = BertConfig(vocab_size=60, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                        intermediate_size=2 * hidden, max_position_embeddings=32, num_labels=labels)  # fmt: skip
    return BertForSequenceClassification(config).eval()


def distilbert():
    config = DistilBertConfig(vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32)
    return DistilBertForSequenceClassification(config).eval()


def vit():
    config = ViTConfig(image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                       intermediate_size=64, num_labels=3)  # fmt: skip
    return ViTForImageClassification(config).eval()


class Net(nn.Module):
    """A residual CNN with BatchNorm; takes pixel_values and labels as the Trainer hands them out."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(width, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
                                   nn.Conv2d(24, width, 3, padding=1), nn.BatchNorm2d(width))  # fmt: skip
        self.head = nn.Linear(width, 3)

    def forward(self, pixel_values, labels=None):
        x = self.stem(pixel_values)
        logits = self.head((x + self.block(x)).relu().mean((2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def texts(rows=4, length=9):
    ids = torch.randint(5, 60, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 3}


def images(rows=4, size=16):
    return {"pixel_values": torch.randn(rows, 3, size, size), "labels": torch.arange(rows) % 3}


def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}
